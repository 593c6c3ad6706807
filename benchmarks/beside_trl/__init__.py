"""Side by side with TRL: the same model, prompts, lengths, reward and updates, through each library's own trainer."""
