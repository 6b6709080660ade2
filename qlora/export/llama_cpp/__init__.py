"""llama.cpp: where its library lies, and its programs in a process of their own."""
