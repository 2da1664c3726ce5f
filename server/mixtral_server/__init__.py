"""The server: queues chat jobs in Redis, hands them to workers over HTTP, streams their tokens to clients. Never imports torch."""
