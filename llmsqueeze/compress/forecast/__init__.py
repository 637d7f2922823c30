"""What a run will take of time, memory and disk: from shapes, a trial of one block, and this machine."""
