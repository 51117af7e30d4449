"""Forms of answers beyond thoughts and text: grammars, tool calls, embeddings and scores."""
