"""Conversations: messages, what a chat template makes of them, and the tokens of what comes next."""
