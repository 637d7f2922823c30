"""Text: read from files, folders and the Hub, chats among it, and cut into rows of tokens."""
