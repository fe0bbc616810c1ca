"""What `dico-ray doctor` examines: each module judges one side of a cluster and knows what to do about it."""
