"""Where benchmark and engine meet: items become questions, questions tokens; models load."""
