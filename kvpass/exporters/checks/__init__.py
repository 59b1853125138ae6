"""What an exported folder is held against: the model's own answers, and what runtimes are known to leave out."""
