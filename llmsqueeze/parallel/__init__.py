"""Work shared among threads (threads.py) and among the processes of a run (processes.py, shares.py)."""
