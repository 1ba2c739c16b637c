(query) => {
  if (!query) { history.replaceState(null, "", location.pathname); return ""; }
  const link = location.origin + location.pathname + "?" + query;
  history.replaceState(null, "", link);
  return link;
}
