"""A node: one process per PKCS#11 token, holding shares and serving operations (``python -m nodes``)."""
