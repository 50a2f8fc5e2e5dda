"""Text ↔ ids: the tokenizer with its control tokens, the models below it, and a memory of words that makes it fast.

Encoding text as a whole with the model (``text_models.py``) is the truth. The memory of words (``word_cache.py``) has
to give the same ids; ``tests/unit/test_word_cache.py`` holds the two together.
"""
