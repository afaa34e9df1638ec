"""The parts of versus_llama_cpp.py: what is run, by whom, and what is made of the answers."""
