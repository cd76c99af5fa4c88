"""What is written is whole, is text, is ours alone while we write, and names no folder of this machine."""
