"""Files and folders of other tools, made ordinary folders."""
