"""The frozen backbone, the contract of a method, and the passes over both together."""
