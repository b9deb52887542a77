"""What vtc knows about transformers, in one room: a change of the host is a change here."""
