"""Notebooks for readers: executed and checked (`notebooks`), and as web pages (`site`)."""
