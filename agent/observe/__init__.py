"""What this machine is and how loaded it is: host, GPUs."""
