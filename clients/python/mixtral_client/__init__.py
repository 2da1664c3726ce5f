"""Python client of the Mixtral chat service, and the wire that its server and workers share."""
