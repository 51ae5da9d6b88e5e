"""What passes share: metadata, reading and editing graphs, recording new nodes."""
