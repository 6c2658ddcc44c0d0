"""bangerd: the composition root. Makes the rooms, answers calls, watches over running VMs."""
