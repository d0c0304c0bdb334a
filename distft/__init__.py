"""distft: fine-tune Hugging Face models on clusters, exactly.

Importing this package costs nothing: torch and transformers are imported by the rooms that need them.
"""

__version__ = "0.1.0"
