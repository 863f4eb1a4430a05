"""Messages to bytes and back, signatures and decisions. It opens no socket and reads no clock."""
