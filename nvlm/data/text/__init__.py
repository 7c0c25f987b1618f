"""Conversations as text, and text as tokens: chat formats, tokenizers, and the two together."""
