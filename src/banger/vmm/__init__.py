"""The VMM room: what a microVM is for its VMM, which VMM this host can use, and two drivers."""
