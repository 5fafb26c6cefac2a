"""The HTTP face: OpenAI's endpoints and shapes on Litestar, written against `gateway.pipeline` alone."""
