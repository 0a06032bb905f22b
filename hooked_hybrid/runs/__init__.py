"""Work that is kept and resumed, its workers, and the identity of a run."""
