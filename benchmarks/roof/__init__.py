"""What a device can do, what a step asks of it, and so how long it has to take."""
