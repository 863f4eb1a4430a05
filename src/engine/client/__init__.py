"""The rooms with sockets: transport, listener, the client engines and the local cluster."""
