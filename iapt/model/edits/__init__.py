"""What a method does to the passes over a backbone: one class for each kind of edit."""
