"""How the bundled demo model is made: text, tokenizer, optimizer, loop and card, one file each."""
