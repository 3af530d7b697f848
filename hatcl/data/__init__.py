"""Examples from files: images, texts, few shots."""
