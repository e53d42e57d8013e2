// Pages before parts of the Python API: who looks for a word wants the page that explains it.
var Scorer = {
  objNameMatch: 8, objPartialMatch: 1,
  objPrio: {0: 2, 1: 1, 2: -5}, objPrioDefault: 0,
  title: 20, partialTitle: 9,
  term: 5, partialTerm: 2
};
