"""The Mixtral network in plain torch: shapes, layers, KV memory, weights. It knows no jobs, no text and no HTTP."""
