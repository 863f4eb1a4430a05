"""The keyquorum command: what a person or a script types. It knows the public API and no message on the wire."""
