"""What can go, what must stay and how the rest makes up for it: costs, allocation and updates."""
