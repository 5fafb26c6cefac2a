"""OpenAI's Responses API: items in, items out, kept in Redis, and runs that outlive connections and gateways."""
