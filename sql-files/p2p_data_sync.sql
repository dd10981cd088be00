\set ON_ERROR_STOP on
\if :{?embedding_dimensions}
\else
\set embedding_dimensions 1536
\endif
-- The hub's tables. PostgreSQL 16 to 18 with the extension pgvector.
--
--   psql -v ON_ERROR_STOP=1 -v embedding_dimensions=1536 -f p2p_data_sync.sql <database>
--
-- `embedding_dimensions` (1 to 2000, 1536 if not given) is fixed when the schema is made. Running the file again changes
-- nothing. A schema of another version is left alone: `p2p-sync-proxy schema upgrade` brings an older one up to date.
-- The proxy runs this file itself on an empty database: lines that begin with a backslash are psql's alone.

BEGIN;
SET LOCAL client_min_messages = warning;
-- Two that set up the same database at once do it one after the other.
SET LOCAL statement_timeout = 0;
DO $$ BEGIN PERFORM pg_advisory_xact_lock(hashtextextended('p2p_sync schema', 0)); END $$;

CREATE SCHEMA IF NOT EXISTS p2p_sync;
COMMENT ON SCHEMA p2p_sync IS 'State and operations that hosts sync to this hub';
CREATE EXTENSION IF NOT EXISTS vector;

CREATE TABLE IF NOT EXISTS p2p_sync.schema_version (
    version     integer PRIMARY KEY,
    applied_at  timestamptz NOT NULL DEFAULT now()
);
DO $$
DECLARE
    v_found integer := (SELECT max(version) FROM p2p_sync.schema_version);
BEGIN
    IF v_found <> 1 THEN
        RAISE EXCEPTION 'the schema is of version %, this file of version 1', v_found
            USING HINT = 'Upgrade an older schema by: p2p-sync-proxy schema upgrade. For a newer one take the newer release.';
    END IF;
END $$;
INSERT INTO p2p_sync.schema_version (version) VALUES (1) ON CONFLICT DO NOTHING;

CREATE TABLE IF NOT EXISTS p2p_sync.hub (
    one_row   boolean PRIMARY KEY DEFAULT true CHECK (one_row),
    hub_id    uuid NOT NULL DEFAULT gen_random_uuid(),
    timeline  bigint NOT NULL DEFAULT 1
);
COMMENT ON COLUMN p2p_sync.hub.timeline IS
    'Raise it after restoring a backup or failing over to a replica that may lack commits: hosts and subscribers resync';
INSERT INTO p2p_sync.hub DEFAULT VALUES ON CONFLICT DO NOTHING;

CREATE TABLE IF NOT EXISTS p2p_sync.hosts (
    host_id      uuid PRIMARY KEY,
    account_id   bigint NOT NULL,
    name         text NOT NULL,
    key_id       text NOT NULL,
    generation   bigint NOT NULL DEFAULT 1,
    status       text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'locked', 'revoked')),
    enrolled_at  timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE p2p_sync.hosts IS 'Volunteers'' machines. No key is stored: each is derived from the master keyring';
COMMENT ON COLUMN p2p_sync.hosts.account_id IS 'The volunteer''s game account; 0 for none';

CREATE TABLE IF NOT EXISTS p2p_sync.host_assignments (
    map         text COLLATE "C" PRIMARY KEY,
    host_id     uuid NOT NULL REFERENCES p2p_sync.hosts,
    tenure      bigint NOT NULL,
    expires_at  timestamptz NOT NULL,
    backups     uuid[] NOT NULL DEFAULT '{}'
);
COMMENT ON TABLE p2p_sync.host_assignments IS
    'Leases: which host writes which map, and until when. Not yet written by this version';
COMMENT ON COLUMN p2p_sync.host_assignments.tenure IS 'Grows each time the map changes hands';

CREATE TABLE IF NOT EXISTS p2p_sync.host_metrics (
    host_id      uuid NOT NULL REFERENCES p2p_sync.hosts,
    received_at  timestamptz NOT NULL DEFAULT now(),
    metrics      jsonb NOT NULL,
    PRIMARY KEY (host_id, received_at)
);
COMMENT ON TABLE p2p_sync.host_metrics IS 'What hosts report of their load and links. Not yet written by this version';

CREATE TABLE IF NOT EXISTS p2p_sync.settled_sequences (
    host_id      uuid NOT NULL,
    incarnation  bigint NOT NULL,
    opening_id    uuid,
    settled      int8multirange NOT NULL DEFAULT '{}',
    opened_at    timestamptz NOT NULL DEFAULT now(),
    closed       boolean NOT NULL DEFAULT false,
    PRIMARY KEY (host_id, incarnation)
) WITH (fillfactor = 50);
COMMENT ON TABLE p2p_sync.settled_sequences IS
    'Which operations of each host''s outbox are decided for good: nothing in `settled` is ever applied again';
COMMENT ON COLUMN p2p_sync.settled_sequences.closed IS
    'Nothing of this incarnation, nor of older ones of the host, is taken any more; their rows may be gone';

CREATE TABLE IF NOT EXISTS p2p_sync.map_states (
    stream    text COLLATE "C" PRIMARY KEY,
    head      bigint NOT NULL,
    home_hub  uuid NOT NULL
) WITH (fillfactor = 50);
COMMENT ON TABLE p2p_sync.map_states IS
    'One row a stream: a map, @player or @host. Whoever writes states or operations of a stream locks its row first, in '
    'the order of the names, and holds it until the commit: so the stream''s numbers are committed in their order';
COMMENT ON COLUMN p2p_sync.map_states.head IS 'The last stream sequence given out; not every number below it is used';

CREATE TABLE IF NOT EXISTS p2p_sync.states (
    path             text COLLATE "C" PRIMARY KEY,
    stream           text COLLATE "C" NOT NULL,
    stream_sequence  bigint NOT NULL,
    data_type        smallint NOT NULL,
    keeps_every      boolean NOT NULL,
    tenure           bigint NOT NULL,
    incarnation      bigint NOT NULL,
    sequence         bigint NOT NULL,
    host_id          uuid NOT NULL,
    operation_id     uuid NOT NULL,
    in_group         boolean NOT NULL,
    account_id       bigint NOT NULL,
    map              text NOT NULL,
    deleted          boolean NOT NULL,
    payload          jsonb,
    received_at      timestamptz NOT NULL,
    logged_at        timestamptz,
    hub_edit         bigint NOT NULL DEFAULT 0,
    origin_hub       uuid NOT NULL,
    version_vector   jsonb NOT NULL DEFAULT '{}',
    CHECK (deleted = (payload IS NULL))
) WITH (fillfactor = 80);
CREATE INDEX IF NOT EXISTS states_by_stream ON p2p_sync.states (stream, stream_sequence);
CREATE INDEX IF NOT EXISTS states_tombstones ON p2p_sync.states (received_at) WHERE deleted;
COMMENT ON TABLE p2p_sync.states IS 'The newest version of each path';
COMMENT ON COLUMN p2p_sync.states.tenure IS 'A higher tenure wins; within one, a host''s own (incarnation, sequence), and between hosts who comes last. Never a clock';
COMMENT ON COLUMN p2p_sync.states.in_group IS 'Written by a group, whose id is `operation_id`';
COMMENT ON COLUMN p2p_sync.states.deleted IS 'A tombstone: what is older than it stays away. Purged after its retention';
COMMENT ON COLUMN p2p_sync.states.logged_at IS 'When an operation of this path was last logged, for types that are sampled';
COMMENT ON COLUMN p2p_sync.states.hub_edit IS
    'Raise it when editing the state by hand: operations of hosts that have not seen the edit are rejected as CONFLICT';

CREATE TABLE IF NOT EXISTS p2p_sync.operations (
    stream           text COLLATE "C" NOT NULL,
    stream_sequence  bigint NOT NULL,
    received_at      timestamptz NOT NULL,
    operation_id     uuid NOT NULL,
    in_group         boolean NOT NULL,
    path             text COLLATE "C" NOT NULL,
    data_type        smallint NOT NULL,
    keeps_every      boolean NOT NULL,
    tenure           bigint NOT NULL,
    incarnation      bigint NOT NULL,
    sequence         bigint NOT NULL,
    host_id          uuid NOT NULL,
    account_id       bigint NOT NULL,
    map              text NOT NULL,
    deleted          boolean NOT NULL,
    payload          jsonb,
    made_at_ms       bigint NOT NULL,
    superseded       boolean NOT NULL,
    origin_hub       uuid NOT NULL
) PARTITION BY RANGE (received_at);
CREATE INDEX IF NOT EXISTS operations_every ON p2p_sync.operations (stream, stream_sequence) WHERE keeps_every;
CREATE INDEX IF NOT EXISTS operations_by_id ON p2p_sync.operations (operation_id);
CREATE TABLE IF NOT EXISTS p2p_sync.operations_default PARTITION OF p2p_sync.operations DEFAULT;
COMMENT ON TABLE p2p_sync.operations IS 'The log, one partition a day (UTC). Payloads are kept for the retention';
COMMENT ON COLUMN p2p_sync.operations.in_group IS
    'A member of a group: all have the group''s id as `operation_id`, in each stream that the group touches';
COMMENT ON COLUMN p2p_sync.operations.superseded IS 'It came when its path held a newer version; of types kept as latest';

CREATE TABLE IF NOT EXISTS p2p_sync.rejected_operations (
    rejection_id  bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    host_id       uuid NOT NULL,
    incarnation   bigint,
    sequence      bigint,
    operation_id  uuid NOT NULL,
    path          text NOT NULL,
    data_type     integer NOT NULL,
    code          integer NOT NULL,
    reason        text NOT NULL,
    payload       bytea NOT NULL,
    received_at   timestamptz NOT NULL DEFAULT now()
);
CREATE UNIQUE INDEX IF NOT EXISTS rejected_by_position
    ON p2p_sync.rejected_operations (host_id, incarnation, sequence) WHERE sequence IS NOT NULL;
CREATE INDEX IF NOT EXISTS rejected_by_operation ON p2p_sync.rejected_operations (host_id, operation_id);
CREATE UNIQUE INDEX IF NOT EXISTS rejected_without_position
    ON p2p_sync.rejected_operations (host_id, operation_id) WHERE sequence IS NULL;
COMMENT ON TABLE p2p_sync.rejected_operations IS 'Dead letters: what was refused for good, with the reason told to its host';
COMMENT ON COLUMN p2p_sync.rejected_operations.path IS 'Empty for a group, which has one row';
COMMENT ON COLUMN p2p_sync.rejected_operations.payload IS
    'As it came: may be no JSON, nor text. Of a group its members: [{"path", "account_id", "map", "data"}]';

CREATE TABLE IF NOT EXISTS p2p_sync.limbo_operations (
    host_id       uuid NOT NULL,
    incarnation   bigint NOT NULL,
    sequence      bigint NOT NULL,
    tenure        bigint NOT NULL,
    operation_id  uuid NOT NULL,
    path          text COLLATE "C" NOT NULL,
    data_type     smallint NOT NULL,
    deleted       boolean NOT NULL,
    payload       jsonb,
    reason        text NOT NULL,
    received_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (host_id, incarnation, sequence)
);
COMMENT ON TABLE p2p_sync.limbo_operations IS
    'What came under a tenure that had passed, until an operator merges or discards it. Not yet written by this version';

CREATE TABLE IF NOT EXISTS p2p_sync.presence (
    char_id     bigint PRIMARY KEY,
    account_id  bigint NOT NULL,
    map         text COLLATE "C" NOT NULL,
    host_id     uuid NOT NULL,
    tenure      bigint NOT NULL,
    entered_at  timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE p2p_sync.presence IS
    'Which one map a character is on, and which host writes it. Not yet written by this version';

CREATE TABLE IF NOT EXISTS p2p_sync.security_validations (
    validation_id  bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    host_id        uuid NOT NULL,
    operation_id   uuid,
    path           text COLLATE "C",
    rule           text NOT NULL,
    verdict        text NOT NULL CHECK (verdict IN ('flagged', 'refused', 'reported by host')),
    details        jsonb NOT NULL DEFAULT '{}',
    received_at    timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX IF NOT EXISTS security_validations_by_host ON p2p_sync.security_validations (host_id, received_at);
COMMENT ON TABLE p2p_sync.security_validations IS
    'What was found against a host, and by which rule; kept as long as the log';
COMMENT ON COLUMN p2p_sync.security_validations.verdict IS
    'flagged: stored, and suspicious. refused: not stored; refusals by one rule are one row a minute, of the first of them, and '
    'details counts its operations. reported by host: the host''s word about others, never this hub''s verdict';
COMMENT ON COLUMN p2p_sync.security_validations.rule IS
    'Of what was refused the code; automatic_lock where so many refusals locked the host';

CREATE TABLE IF NOT EXISTS p2p_sync.cache (
    owner       text COLLATE "C" NOT NULL,
    key         text COLLATE "C" NOT NULL,
    value       bytea NOT NULL,
    expires_at  timestamptz,
    PRIMARY KEY (owner, key)
);
COMMENT ON TABLE p2p_sync.cache IS 'What hosts cache, each in a key space of its own. Not yet written by this version';
COMMENT ON COLUMN p2p_sync.cache.owner IS 'A host id, or ''shared'' for the operator''s own, which hosts may only read';

CREATE TABLE IF NOT EXISTS p2p_sync.embeddings (
    path         text COLLATE "C" PRIMARY KEY,
    map          text COLLATE "C" NOT NULL,
    data_type    smallint NOT NULL,
    model        text NOT NULL,
    content      text NOT NULL,
    embedding    vector(:embedding_dimensions) NOT NULL,
    embedded_at  timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX IF NOT EXISTS embeddings_by_cosine ON p2p_sync.embeddings USING hnsw (embedding vector_cosine_ops);
COMMENT ON TABLE p2p_sync.embeddings IS
    'Texts of operations with their vectors, searched by cosine. Not yet written by this version';

-- The rows of hot single-row updates are rewritten all the time: cleaned up early, the tables stay in a few pages.
ALTER TABLE p2p_sync.settled_sequences SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000);
ALTER TABLE p2p_sync.map_states SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000);

-- Makes the log's partitions of today and tomorrow. A day whose rows have come to the default partition already stays
-- there. Called each time the proxy maintains the schema.
CREATE OR REPLACE FUNCTION p2p_sync.create_log_partitions() RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    v_day timestamp;
BEGIN
    FOR v_day IN SELECT date_trunc('day', now() AT TIME ZONE 'UTC') + days * interval '1 day' FROM generate_series(0, 1) AS days LOOP
        IF to_regclass(format('p2p_sync.operations_%s', to_char(v_day, 'YYYYMMDD'))) IS NULL
            AND NOT EXISTS (
                SELECT FROM p2p_sync.operations_default
                WHERE received_at >= v_day AT TIME ZONE 'UTC' AND received_at < (v_day + interval '1 day') AT TIME ZONE 'UTC')
        THEN
            EXECUTE format(
                'CREATE TABLE p2p_sync.operations_%s PARTITION OF p2p_sync.operations FOR VALUES FROM (%L) TO (%L)',
                to_char(v_day, 'YYYYMMDD'), v_day AT TIME ZONE 'UTC', (v_day + interval '1 day') AT TIME ZONE 'UTC');
        END IF;
    END LOOP;
END $$;
DO $$ BEGIN PERFORM p2p_sync.create_log_partitions(); END $$;

-- Locks the row of an incarnation that has none yet, making it. An incarnation that is closed gets none, and a host may
-- have 4096 open ones at most (P2G01): an agent that comes regularly has one or two.
CREATE OR REPLACE FUNCTION p2p_sync.open_incarnation(p_host uuid, p_incarnation bigint) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM p2p_sync.settled_sequences WHERE host_id = p_host AND incarnation >= p_incarnation AND closed) THEN
        RETURN false;
    END IF;
    IF (SELECT count(*) FROM p2p_sync.settled_sequences WHERE host_id = p_host) >= 4096 THEN
        RAISE EXCEPTION 'host % has too many unfinished incarnations of its outbox', p_host USING ERRCODE = 'P2G01';
    END IF;
    INSERT INTO p2p_sync.settled_sequences (host_id, incarnation) VALUES (p_host, p_incarnation) ON CONFLICT DO NOTHING;
    PERFORM FROM p2p_sync.settled_sequences WHERE host_id = p_host AND incarnation = p_incarnation FOR UPDATE;
    RETURN true;
END $$;

-- Whether an operation is decided for good. Of an incarnation that is closed nothing will come any more: it counts as
-- settled, so that what follows it is not held back for ever.
CREATE OR REPLACE FUNCTION p2p_sync.is_settled(p_host uuid, p_incarnation bigint, p_sequence bigint) RETURNS boolean
LANGUAGE sql STABLE AS $$
    SELECT EXISTS (SELECT FROM p2p_sync.settled_sequences
            WHERE host_id = p_host AND incarnation = p_incarnation AND settled @> p_sequence)
        OR EXISTS (SELECT FROM p2p_sync.settled_sequences
            WHERE host_id = p_host AND incarnation >= p_incarnation AND closed);
$$;

-- Applies what one message holds of one incarnation of one host's outbox. Called as a statement of its own it is one
-- transaction: what it returns is committed when the caller reads it.
--
-- Operations come as parallel arrays in the order of their sequences, each sequence once, or once for each member of a
-- group: those are decided together. `p_batch`, `p_refused` and
-- `p_withdrawn` are sets of sequences: to be applied, to be refused, never to come.
--   p_streams, p_stream_counts   the streams of the operations, sorted, and how many operations each has
--   p_stream_of, p_stream_back   per operation: which of `p_streams`, and how many operations of that stream follow it
--   p_in_group                   per operation: a member of a group; empty when none is
--   p_log_seconds                per operation: 0 is always logged, n at most every n seconds a path, NULL never
--
-- In order: lock the incarnation's row; find what is new; hold back what has to wait for a predecessor; settle; keep what
-- is refused; and last, for then other hosts' messages about the same maps have to wait: lock the streams, take their
-- numbers, compare with the states and write them and the log.
--
-- The result: `closed` (nothing was done), `waiting` (not settled, to be sent again), `refused_before` (was to be refused,
-- but an earlier call had settled it), `told_*` (what an earlier call had rejected, with the reason given then) and
-- `decided_*` (0 applied, 1 superseded, 2 conflict with an edit by the hub), by place in the arrays. An operation in none of them was applied by
-- an earlier call.
CREATE OR REPLACE FUNCTION p2p_sync.apply_batch(
    p_host uuid, p_incarnation bigint, p_gaps_max integer,
    p_batch int8multirange, p_refused int8multirange, p_withdrawn int8multirange,
    p_streams text[], p_stream_counts bigint[],
    p_sequences bigint[], p_predecessor_incarnations bigint[], p_predecessors bigint[],
    p_stream_of integer[], p_stream_back bigint[],
    p_operation_ids uuid[], p_tenures bigint[], p_paths text[], p_data_types smallint[], p_keeps_every boolean[],
    p_log_seconds integer[], p_deleted boolean[], p_account_ids bigint[], p_maps text[], p_hub_edits_seen bigint[],
    p_made_at_ms bigint[], p_payloads jsonb[], p_in_group boolean[],
    p_refused_sequences bigint[], p_refused_ids uuid[], p_refused_paths text[], p_refused_types integer[],
    p_refused_codes integer[], p_refused_reasons text[], p_refused_payloads bytea[],
    p_conflict_code integer, p_conflict_reason text,
    OUT timeline bigint, OUT received_at_ms bigint, OUT closed boolean, OUT waiting bigint[], OUT refused_before bigint[],
    OUT told_sequences bigint[], OUT told_codes integer[], OUT told_reasons text[],
    OUT decided_rows bigint[], OUT decided_outcomes smallint[], OUT decided_numbers bigint[]
) LANGUAGE plpgsql AS $$
DECLARE
    v_hub uuid;
    v_settled int8multirange;
    v_after int8multirange;
    v_new int8multirange;
    v_operation record;
    v_heads bigint[];
    v_conflicting bigint[] := '{}';
BEGIN
    received_at_ms := floor(extract(epoch FROM now()) * 1000);

    -- Mostly nothing was sent before and nothing has to wait: then all that comes is settled at once, by the statement that
    -- also makes messages about the same incarnation wait for one another.
    UPDATE p2p_sync.settled_sequences AS s SET settled = s.settled + p_batch + p_refused + p_withdrawn
        FROM p2p_sync.hub
        WHERE s.host_id = p_host AND s.incarnation = p_incarnation AND NOT s.closed
            AND NOT s.settled && (p_batch + p_refused) AND cardinality(p_predecessors) = 0
        RETURNING hub.hub_id, hub.timeline, s.settled, s.closed INTO v_hub, timeline, v_after, closed;
    IF FOUND THEN
        v_new := p_batch;
        v_settled := '{}';
    ELSE
        LOOP
            SELECT hub.hub_id, hub.timeline, s.settled, s.closed INTO v_hub, timeline, v_settled, closed
                FROM p2p_sync.hub, p2p_sync.settled_sequences AS s
                WHERE s.host_id = p_host AND s.incarnation = p_incarnation
                FOR UPDATE OF s;
            EXIT WHEN FOUND;
            IF NOT p2p_sync.open_incarnation(p_host, p_incarnation) THEN
                SELECT hub.timeline, true INTO timeline, closed FROM p2p_sync.hub;
            END IF;
            EXIT WHEN closed;
        END LOOP;
        IF closed THEN
            RETURN;
        END IF;

        v_new := p_batch - v_settled;

        -- An operation waits until its predecessor is settled, or is before it in this call. They come in the order of their
        -- sequences, so each predecessor is decided when its successor's turn comes.
        IF cardinality(p_predecessors) > 0 AND NOT isempty(v_new) THEN
            v_after := v_settled + p_batch + p_refused + p_withdrawn;
            FOR v_operation IN
                SELECT o.sequence, o.predecessor_incarnation, o.predecessor
                    FROM unnest(p_sequences, p_predecessor_incarnations, p_predecessors) WITH ORDINALITY
                        AS o(sequence, predecessor_incarnation, predecessor, ord)
                    WHERE o.predecessor IS NOT NULL AND v_new @> o.sequence
                    ORDER BY o.ord
            LOOP
                IF v_operation.predecessor_incarnation < p_incarnation THEN
                    CONTINUE WHEN p2p_sync.is_settled(p_host, v_operation.predecessor_incarnation, v_operation.predecessor);
                ELSE
                    CONTINUE WHEN v_after @> v_operation.predecessor;
                END IF;
                -- Another member of its group waits already.
                CONTINUE WHEN NOT v_after @> v_operation.sequence;
                v_after := v_after - int8multirange(int8range(v_operation.sequence, v_operation.sequence, '[]'));
                waiting := waiting || v_operation.sequence;
            END LOOP;
            v_new := v_new * v_after;
        END IF;

        v_after := v_settled + v_new + p_refused + (p_withdrawn - p_batch);
        IF v_after <> v_settled THEN
            UPDATE p2p_sync.settled_sequences SET settled = v_after WHERE host_id = p_host AND incarnation = p_incarnation;
        END IF;

        IF v_settled && (p_batch + p_refused) THEN
            SELECT array_agg(r.sequence), array_agg(r.code), array_agg(r.reason) INTO told_sequences, told_codes, told_reasons
                FROM p2p_sync.rejected_operations AS r
                WHERE r.host_id = p_host AND r.incarnation = p_incarnation
                    AND r.sequence BETWEEN lower(p_batch + p_refused) AND upper(p_batch + p_refused)
                    AND (p_batch + p_refused) * v_settled @> r.sequence;
            SELECT array_agg(r.sequence) INTO refused_before
                FROM unnest(p_refused_sequences) AS r(sequence) WHERE v_settled @> r.sequence;
        END IF;
    END IF;

    IF v_after <> int8multirange(range_merge(v_after)) AND (SELECT count(*) FROM unnest(v_after)) > p_gaps_max + 1 THEN
        RAISE EXCEPTION 'more than % gaps in the settled sequences of host %', p_gaps_max, p_host USING ERRCODE = 'P2G01';
    END IF;

    IF cardinality(p_refused_ids) > 0 THEN
        INSERT INTO p2p_sync.rejected_operations
                (host_id, incarnation, sequence, operation_id, path, data_type, code, reason, payload)
            SELECT p_host, p_incarnation, r.sequence, r.operation_id, r.path, r.data_type, r.code, r.reason, r.payload
                FROM unnest(p_refused_sequences, p_refused_ids, p_refused_paths, p_refused_types,
                        p_refused_codes, p_refused_reasons, p_refused_payloads)
                    AS r(sequence, operation_id, path, data_type, code, reason, payload)
                WHERE NOT v_settled @> r.sequence;
    END IF;

    IF isempty(v_new) THEN
        RETURN;
    END IF;

    -- Each row is locked as it is reached, and they come sorted: messages about the same maps wait, but never in a circle.
    -- Numbers for operations that turn out to need none are left unused.
    WITH allocated AS (
        INSERT INTO p2p_sync.map_states AS m (stream, head, home_hub)
            SELECT a.stream, a.count, v_hub FROM unnest(p_streams, p_stream_counts) AS a(stream, count)
            ON CONFLICT (stream) DO UPDATE SET head = m.head + excluded.head
            RETURNING m.stream, m.head
    )
    SELECT array_agg(head ORDER BY stream) INTO v_heads FROM allocated;

    -- A group with one member that conflicts is refused whole.
    IF cardinality(p_in_group) > 0 THEN
        SELECT coalesce(array_agg(o.sequence), '{}') INTO v_conflicting
            FROM unnest(p_sequences, p_paths, p_hub_edits_seen, p_in_group) AS o(sequence, path, hub_edit_seen, in_group)
            JOIN p2p_sync.states AS s ON s.path = o.path
            WHERE o.in_group AND v_new @> o.sequence AND s.hub_edit <> o.hub_edit_seen;
    END IF;

    -- With the streams locked, what this statement reads of their states is what it writes over.
    -- Incarnations are counted by each host's own outbox and order the operations of that host alone. Until leases give each
    -- writer a tenure of its own, hosts that write one path share a tenure, and among them the one that comes last wins.
    -- An edit that was seen but is not there is as wrong as one that is there but was not seen.
    WITH decided AS MATERIALIZED (
        SELECT *, newer AND NOT conflicts AND row_number() OVER (
                PARTITION BY path ORDER BY newer AND NOT conflicts DESC, tenure DESC, sequence DESC) = 1 AS is_newest
            FROM (
                SELECT o.*, coalesce(o.grouped, false) AS in_group, v_heads[o.stream_of] - o.stream_back AS number,
                        coalesce(s.hub_edit <> o.hub_edit_seen, false) OR o.sequence = ANY (v_conflicting) AS conflicts,
                        coalesce(o.tenure > s.tenure OR o.tenure = s.tenure AND (
                            s.host_id <> p_host OR (p_incarnation, o.sequence) > (s.incarnation, s.sequence)), true) AS newer,
                        o.log_seconds = 0
                            OR coalesce(s.logged_at, '-infinity') <= now() - make_interval(secs => o.log_seconds) AS log_is_due
                    FROM unnest(p_sequences, p_stream_of, p_stream_back, p_operation_ids, p_tenures, p_paths, p_data_types,
                            p_keeps_every, p_log_seconds, p_deleted, p_account_ids, p_maps, p_hub_edits_seen, p_made_at_ms,
                            p_payloads, p_in_group)
                        WITH ORDINALITY AS o(sequence, stream_of, stream_back, operation_id, tenure, path, data_type,
                            keeps_every, log_seconds, deleted, account_id, map, hub_edit_seen, made_at_ms, payload, grouped,
                            place)
                    LEFT JOIN LATERAL (SELECT hub_edit, host_id, tenure, incarnation, sequence, logged_at
                        FROM p2p_sync.states WHERE states.path = o.path LIMIT 1) AS s ON true
                    WHERE v_new @> o.sequence
            ) AS compared
    ), written AS (
        INSERT INTO p2p_sync.states AS s (path, stream, stream_sequence, data_type, keeps_every, tenure, incarnation,
                sequence, host_id, operation_id, in_group, account_id, map, deleted, payload, received_at, logged_at,
                origin_hub)
            SELECT path, p_streams[stream_of], number, data_type, keeps_every, tenure, p_incarnation,
                    sequence, p_host, operation_id, in_group, account_id, map, deleted, payload, now(),
                    CASE WHEN log_is_due THEN now() END, v_hub
                FROM decided WHERE is_newest
            ON CONFLICT (path) DO UPDATE SET
                stream_sequence = excluded.stream_sequence, data_type = excluded.data_type,
                keeps_every = excluded.keeps_every, tenure = excluded.tenure, incarnation = excluded.incarnation,
                sequence = excluded.sequence, host_id = excluded.host_id, operation_id = excluded.operation_id,
                in_group = excluded.in_group, account_id = excluded.account_id, map = excluded.map, deleted = excluded.deleted,
                payload = excluded.payload, received_at = excluded.received_at,
                logged_at = coalesce(excluded.logged_at, s.logged_at), origin_hub = excluded.origin_hub
    ), logged AS (
        INSERT INTO p2p_sync.operations (stream, stream_sequence, received_at, operation_id, in_group, path, data_type,
                keeps_every, tenure, incarnation, sequence, host_id, account_id, map, deleted, payload, made_at_ms, superseded, origin_hub)
            SELECT p_streams[stream_of], number, now(), operation_id, in_group, path, data_type, keeps_every,
                    tenure, p_incarnation, sequence, p_host, account_id, map, deleted, payload, made_at_ms,
                    NOT (is_newest OR keeps_every), v_hub
                FROM decided
                WHERE NOT conflicts AND (log_seconds = 0 OR is_newest AND log_is_due)
    )
    SELECT array_agg(place), array_agg(number),
            array_agg(CASE WHEN conflicts THEN 2 WHEN is_newest OR keeps_every THEN 0 ELSE 1 END::smallint)
        INTO decided_rows, decided_numbers, decided_outcomes
        FROM decided;

    IF 2 = ANY (decided_outcomes) THEN
        INSERT INTO p2p_sync.rejected_operations
                (host_id, incarnation, sequence, operation_id, path, data_type, code, reason, payload)
            SELECT p_host, p_incarnation, o.sequence, o.operation_id, o.path, o.data_type,
                    p_conflict_code, p_conflict_reason, convert_to(coalesce(o.payload::text, ''), 'UTF8')
                FROM unnest(p_sequences, p_operation_ids, p_paths, p_data_types, p_payloads, p_in_group)
                    WITH ORDINALITY AS o(sequence, operation_id, path, data_type, payload, grouped, place)
                JOIN unnest(decided_rows, decided_outcomes) AS d(place, outcome) USING (place)
                WHERE d.outcome = 2 AND o.grouped IS NOT TRUE
            UNION ALL
            SELECT p_host, p_incarnation, o.sequence, (array_agg(o.operation_id))[1], '', -1,
                    p_conflict_code, p_conflict_reason,
                    convert_to(jsonb_agg(jsonb_build_object('path', o.path, 'account_id', o.account_id, 'map', o.map)
                            || CASE WHEN o.deleted THEN '{}' ELSE jsonb_build_object('data', o.payload) END
                        ORDER BY o.place)::text, 'UTF8')
                FROM unnest(p_sequences, p_operation_ids, p_paths, p_account_ids, p_maps, p_deleted, p_payloads, p_in_group)
                    WITH ORDINALITY AS o(sequence, operation_id, path, account_id, map, deleted, payload, grouped, place)
                JOIN unnest(decided_rows, decided_outcomes) AS d(place, outcome) USING (place)
                WHERE d.outcome = 2 AND o.grouped
                GROUP BY o.sequence;
    END IF;
END $$;
COMMENT ON FUNCTION p2p_sync.apply_batch IS 'Applies one message of one host, all in one transaction: see the schema''s file';

COMMIT;
