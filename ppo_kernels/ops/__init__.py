"""One file per op family: public function, reference, autograd.Function, Op declaration."""
