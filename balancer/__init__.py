"""The balancer: the registry of keys and the control loop behind the routing tables. It never serves a key."""
