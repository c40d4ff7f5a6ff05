-- BM25 (Robertson and Zaragoza 2009) as in `ranked`, of memories that an index has found by their terms: all of them are ranked.
CREATE FUNCTION ranked_of(wanted text[], weights float8[], average float8, marks text[], candidates bigint[])
RETURNS TABLE (memory bigint, score float8)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path FROM CURRENT
AS $$ SELECT t.memory, (SELECT sum(w.weight * c.count * 2.2 / (c.count + 1.2 * (0.25 + 0.75 * t.length / average)))
        FROM unnest(wanted, weights) w (term, weight),
        LATERAL (SELECT t.counts[array_position(t.terms, w.term)] AS count) c)
    FROM texts t
    WHERE t.memory = ANY (candidates) AND t.terms && wanted AND (marks IS NULL OR t.terms && marks)
        AND t.tenant = current_setting('aeterna.tenant', true) $$;
