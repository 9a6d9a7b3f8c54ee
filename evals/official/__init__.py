"""Tests that people compare on, in their official file formats, prompts and scoring; LLaVA-1.5's evaluation is the reference."""
