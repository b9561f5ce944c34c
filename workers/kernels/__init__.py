"""The arithmetic itself: ``reference.py`` in torch is the meaning."""
