"""The compute-bound pool: computes prompts chunk by chunk, samples the first token, gives the pages away."""
