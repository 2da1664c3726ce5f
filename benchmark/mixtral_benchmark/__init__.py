"""The stress benchmark: many chats at once against a running server, timed from the client's side."""
