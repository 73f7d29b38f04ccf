"""Experiments behind the tables and pictures of results/: each module is one command, resumable at any moment."""
