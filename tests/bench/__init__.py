"""`make bench`: banger against a bare VMM, ssh and the bare interpreter, on the machine at hand."""
