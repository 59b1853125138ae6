"""From a traced step to the files of a format."""
