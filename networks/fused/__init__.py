"""The blocks and the LLM adapter with their adapters, written out forward and backward; begin at blocks.py."""
