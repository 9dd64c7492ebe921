"""Tilewright: an LLM inference stack that is a compiler."""
