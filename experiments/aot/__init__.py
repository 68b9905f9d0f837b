"""Every step compiled for described GPUs, without one."""
