\set ON_ERROR_STOP on
\if :{?embedding_dimensions}
\else
\set embedding_dimensions 1536
\endif
\if :{?hnsw_m}
\else
\set hnsw_m 16
\endif
\if :{?hnsw_ef_construction}
\else
\set hnsw_ef_construction 64
\endif
-- The hub's tables. PostgreSQL 16 to 18 with the extension pgvector, from 0.8.
--
--   psql -v ON_ERROR_STOP=1 -v embedding_dimensions=1536 -f p2p_data_sync.sql <database>
--
-- `embedding_dimensions` (1 to 4000, 1536 if not given), `hnsw_m` (2 to 100, 16) and `hnsw_ef_construction` (4 to 1000, 64)
-- hold for the index of vectors when the schema is made; `p2p-sync-proxy schema reembed` changes them later. Running the file
-- again changes nothing. A schema of another version is left alone: `p2p-sync-proxy schema upgrade` brings an older one up to date.
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
    timeline  bigint NOT NULL DEFAULT 1,
    alive_at  timestamptz NOT NULL DEFAULT now(),
    edits     bigint NOT NULL DEFAULT 0,
    server    text
);
COMMENT ON COLUMN p2p_sync.hub.timeline IS
    'Grows when the database may have gone back: by itself where another server is found under it, see note_server. Raise it by '
    'hand after a copy of the data directory was put back on the same server. Subscribers resync, tenures jump ahead';
COMMENT ON COLUMN p2p_sync.hub.server IS
    'Which Postgres it was when a proxy connected last: the cluster''s own number, and the timeline of its log, which each '
    'promotion of a replica and each recovery to a point in time raises';
COMMENT ON COLUMN p2p_sync.hub.alive_at IS
    'When a proxy last noted that the hub serves: the time it was away does not count towards the end of a lease. Whether '
    'another''s lease has run out is asked of this time and not of the clock, which runs on while the hub is away';
COMMENT ON COLUMN p2p_sync.hub.edits IS
    'Counts the operator''s edits, and numbers them: no number comes twice, whatever becomes of the path. Running proxies '
    'look at it to see that their caches are behind';
INSERT INTO p2p_sync.hub DEFAULT VALUES ON CONFLICT DO NOTHING;

CREATE TABLE IF NOT EXISTS p2p_sync.hosts (
    host_id      uuid PRIMARY KEY,
    account_id   bigint NOT NULL,
    name         text NOT NULL,
    key_id       text NOT NULL,
    generation   bigint NOT NULL DEFAULT 1,
    status       text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'locked', 'revoked')),
    enrolled_at  timestamptz NOT NULL DEFAULT now(),
    public_key   bytea CHECK (octet_length(public_key) = 32),
    lock_reason  text,
    last_seen    timestamptz,
    next_key_id      text,
    next_request_id  uuid,
    former_key_id    text,
    renewed_by       uuid,
    renewed_at       timestamptz,
    role             text NOT NULL DEFAULT 'host' CHECK (role IN ('host', 'hub'))
);
COMMENT ON TABLE p2p_sync.hosts IS 'Volunteers'' machines. No key is stored: each is derived from the master keyring';
COMMENT ON COLUMN p2p_sync.hosts.account_id IS 'The volunteer''s game account; 0 for none';
COMMENT ON COLUMN p2p_sync.hosts.public_key IS 'Ed25519, registered at enrolment; NULL for a host that was added by hand';
COMMENT ON COLUMN p2p_sync.hosts.lock_reason IS 'Why it is locked, for people';
COMMENT ON COLUMN p2p_sync.hosts.last_seen IS 'When it last said hello, to the minute';
COMMENT ON COLUMN p2p_sync.hosts.next_key_id IS
    'Of the next generation''s credential, which was given out and not used yet; next_request_id asked for it, and is NULL '
    'since the host was locked';
COMMENT ON COLUMN p2p_sync.hosts.role IS
    'hub: a machine of the operator''s own. It reports the metrics of other hosts, asks for maps for others, and holds the maps '
    'that nobody else fits';
COMMENT ON COLUMN p2p_sync.hosts.former_key_id IS
    'Of the generation before, which is let in for a minute after renewed_at; renewed_by asked for the present one';

CREATE TABLE IF NOT EXISTS p2p_sync.invitations (
    invitation_id  bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    token_hash     bytea NOT NULL UNIQUE CHECK (octet_length(token_hash) = 32),
    key_id         text NOT NULL,
    account_id     bigint NOT NULL,
    name           text NOT NULL,
    maps           text[] NOT NULL DEFAULT '{}',
    created_at     timestamptz NOT NULL DEFAULT now(),
    expires_at     timestamptz NOT NULL,
    revoked_at     timestamptz,
    used_at        timestamptz,
    public_key     bytea,
    host_id        uuid REFERENCES p2p_sync.hosts,
    role           text NOT NULL DEFAULT 'host' CHECK (role IN ('host', 'hub'))
);
CREATE INDEX IF NOT EXISTS invitations_by_host ON p2p_sync.invitations (host_id);
COMMENT ON TABLE p2p_sync.invitations IS
    'One-time tokens of enrolment. A token''s secret is derived from the master keyring and its id, of which only the hash '
    'is here: who reads this cannot enrol';
COMMENT ON COLUMN p2p_sync.invitations.public_key IS 'Of the host that used it; the same one gets the same answer again until it expires';

CREATE TABLE IF NOT EXISTS p2p_sync.host_assignments (
    map              text COLLATE "C" PRIMARY KEY,
    host_id          uuid REFERENCES p2p_sync.hosts,
    tenure           bigint NOT NULL,
    expires_at       timestamptz NOT NULL,
    granted_at       timestamptz NOT NULL DEFAULT now(),
    stream_head      bigint NOT NULL DEFAULT 0,
    backups          uuid[] NOT NULL DEFAULT '{}',
    assistants       uuid[] NOT NULL DEFAULT '{}',
    successor        uuid REFERENCES p2p_sync.hosts,
    catch_up_until   timestamptz,
    hand_over_until  timestamptz,
    changes          bigint NOT NULL DEFAULT 1,
    CHECK ((successor IS NULL) = (catch_up_until IS NULL)),
    CHECK (successor IS NOT NULL OR hand_over_until IS NULL)
) WITH (fillfactor = 50);
CREATE INDEX IF NOT EXISTS host_assignments_by_host ON p2p_sync.host_assignments (host_id);
COMMENT ON TABLE p2p_sync.host_assignments IS
    'Leases: which host writes which map, and who stands by. Whoever changes host or tenure locks the map''s row in map_states '
    'first, as its writers do, so that a writer who has that lock reads what holds until its commit';
COMMENT ON COLUMN p2p_sync.host_assignments.host_id IS 'NULL: nobody holds it';
COMMENT ON COLUMN p2p_sync.host_assignments.tenure IS 'Of the last holder; grows each time the map changes hands';
COMMENT ON COLUMN p2p_sync.host_assignments.expires_at IS
    'From then on, by hub.alive_at, another host may be given the map. Until one is, the holder goes on writing and may renew';
COMMENT ON COLUMN p2p_sync.host_assignments.stream_head IS 'How far the map''s stream was when the tenure began';
COMMENT ON COLUMN p2p_sync.host_assignments.backups IS 'Hosts that keep a copy, to take the map over; none of them the holder';
COMMENT ON COLUMN p2p_sync.host_assignments.successor IS
    'To whom the map is being handed over. It catches up first, until catch_up_until; then the holder is asked, which sets '
    'hand_over_until: it releases the map until then, by hub.alive_at, or the map is taken';
COMMENT ON COLUMN p2p_sync.host_assignments.changes IS
    'Counts the changes of all but expires_at: proxies see by the sum over all maps that there is something to tell';

-- Renewals are no change, and many.
CREATE OR REPLACE FUNCTION p2p_sync.count_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.changes := OLD.changes + 1;
    RETURN NEW;
END $$;
CREATE OR REPLACE TRIGGER host_assignments_change BEFORE UPDATE ON p2p_sync.host_assignments FOR EACH ROW
    WHEN ((OLD.host_id, OLD.tenure, OLD.backups, OLD.assistants, OLD.successor, OLD.hand_over_until)
        IS DISTINCT FROM (NEW.host_id, NEW.tenure, NEW.backups, NEW.assistants, NEW.successor, NEW.hand_over_until))
    EXECUTE FUNCTION p2p_sync.count_change();

CREATE TABLE IF NOT EXISTS p2p_sync.map_rules (
    map         text COLLATE "C" PRIMARY KEY,
    automatic   boolean NOT NULL DEFAULT false,
    backups     smallint NOT NULL DEFAULT 0 CHECK (backups BETWEEN 0 AND 8),
    assistants  smallint NOT NULL DEFAULT 0 CHECK (assistants BETWEEN 0 AND 8),
    hosts       uuid[] NOT NULL DEFAULT '{}',
    score_min   double precision NOT NULL DEFAULT 0 CHECK (score_min BETWEEN 0 AND 100)
);
COMMENT ON TABLE p2p_sync.map_rules IS
    'Who may have which map, and how many stand by for it. A map without a rule is given by the operator alone, and nobody stands by';
COMMENT ON COLUMN p2p_sync.map_rules.automatic IS 'The hub gives it to whoever fits best, and moves it';
COMMENT ON COLUMN p2p_sync.map_rules.hosts IS 'Who may have it; empty: any active host';
COMMENT ON COLUMN p2p_sync.map_rules.score_min IS 'Of a host that may have it, of 100';

CREATE TABLE IF NOT EXISTS p2p_sync.host_copies (
    map       text COLLATE "C" NOT NULL,
    host_id   uuid NOT NULL,
    sequence  bigint NOT NULL,
    told_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (map, host_id)
) WITH (fillfactor = 50);
COMMENT ON TABLE p2p_sync.host_copies IS
    'How far the copies of maps are, by the word of the hosts that stand by for them; of others nothing is taken';

CREATE TABLE IF NOT EXISTS p2p_sync.map_tenures (
    map         text COLLATE "C" NOT NULL,
    tenure      bigint NOT NULL,
    host_id     uuid NOT NULL REFERENCES p2p_sync.hosts,
    granted_at  timestamptz NOT NULL DEFAULT now(),
    ended_at    timestamptz,
    ended_by    text CHECK (ended_by IN ('released', 'handed over', 'taken', 'lapsed', 'late')),
    PRIMARY KEY (map, tenure)
);
CREATE INDEX IF NOT EXISTS map_tenures_by_host ON p2p_sync.map_tenures (host_id, map, tenure);
CREATE INDEX IF NOT EXISTS map_tenures_lapsed ON p2p_sync.map_tenures (host_id, ended_at) WHERE ended_by IN ('lapsed', 'late');
COMMENT ON TABLE p2p_sync.map_tenures IS
    'Who held which tenure of which map: tells an operation that came late from one that is forged. Never purged';
COMMENT ON COLUMN p2p_sync.map_tenures.ended_by IS
    'released: by its holder or the operator; handed over; taken by the operator; lapsed: its lease ran out and another host '
    'was given the map; late: a hand-over was asked for, and the holder did not release in time';

CREATE TABLE IF NOT EXISTS p2p_sync.lease_renewals (
    host_id      uuid PRIMARY KEY REFERENCES p2p_sync.hosts,
    incarnation  bigint NOT NULL,
    counter      bigint NOT NULL,
    renewed_at   timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 50);
COMMENT ON TABLE p2p_sync.lease_renewals IS
    'The last renewal of each host, or the last change that it asked for of a map: one that is not newer, by (incarnation, '
    'counter), is a repetition and does nothing';

CREATE TABLE IF NOT EXISTS p2p_sync.host_attendances (
    host_id          uuid PRIMARY KEY REFERENCES p2p_sync.hosts,
    attended_at      timestamptz NOT NULL DEFAULT now(),
    leaving          boolean NOT NULL,
    keeps_no_copies  boolean NOT NULL
) WITH (fillfactor = 50);
COMMENT ON TABLE p2p_sync.host_attendances IS
    'Which hosts listen for what the hub asks of them; noted every few seconds while they do. Who does not is given no map by the hub itself';
COMMENT ON COLUMN p2p_sync.host_attendances.leaving IS 'It gives its maps up and wants no others';

CREATE TABLE IF NOT EXISTS p2p_sync.host_metrics (
    host_id      uuid NOT NULL REFERENCES p2p_sync.hosts,
    received_at  timestamptz NOT NULL,
    reported_by  uuid NOT NULL,
    metrics      jsonb NOT NULL,
    PRIMARY KEY (host_id, received_at)
);
CREATE INDEX IF NOT EXISTS host_metrics_by_time ON p2p_sync.host_metrics (received_at);
COMMENT ON TABLE p2p_sync.host_metrics IS
    'What hosts reported of their load and links, one report a minute of each: the history of the states @host/<id>/HOST_METRICS';
COMMENT ON COLUMN p2p_sync.host_metrics.reported_by IS 'The host itself, or one in the hub''s role';

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

CREATE TABLE IF NOT EXISTS p2p_sync.stream_floors (
    stream  text COLLATE "C" PRIMARY KEY,
    floor   bigint NOT NULL
);
COMMENT ON TABLE p2p_sync.stream_floors IS
    'Up to which position deletions and logged operations of a stream may be forgotten: a subscriber that was told less begins '
    'anew, with a snapshot. Apart from map_states, whose rows the writers lock';

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
-- For scans: where ids are never used again, a map has far more tombstones than states.
CREATE INDEX IF NOT EXISTS states_there ON p2p_sync.states (path) WHERE NOT deleted;
-- Mostly nothing is edited: then asking it costs each write next to nothing.
CREATE INDEX IF NOT EXISTS states_edited ON p2p_sync.states (path) WHERE hub_edit > 0;
COMMENT ON TABLE p2p_sync.states IS 'The newest version of each path';
COMMENT ON COLUMN p2p_sync.states.tenure IS 'A higher tenure wins; within one, a host''s own (incarnation, sequence), and between hosts who comes last. Never a clock';
COMMENT ON COLUMN p2p_sync.states.in_group IS 'Written by a group, whose id is `operation_id`';
COMMENT ON COLUMN p2p_sync.states.deleted IS 'A tombstone: what is older than it stays away. Purged after its retention';
COMMENT ON COLUMN p2p_sync.states.logged_at IS 'When an operation of this path was last logged, for types that are sampled';
COMMENT ON COLUMN p2p_sync.states.host_id IS 'Who wrote it; of an edit of the operator''s the nil UUID';
COMMENT ON COLUMN p2p_sync.states.hub_edit IS
    'The number of the last edit by the operator (p2p-sync-proxy ops put), 0 for none: what hosts write that have not seen '
    'it is a conflict. Who edits by hand raises it, above hub.edits; caches are behind then until they expire';
COMMENT ON COLUMN p2p_sync.states.version_vector IS
    'The last edit by each hub: {"<hub_id>": <number>}. This hub''s own is hub_edit. Others'' come with federation';

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
    origin_hub       uuid NOT NULL,
    hub_edit         bigint NOT NULL DEFAULT 0
) PARTITION BY RANGE (received_at);
CREATE INDEX IF NOT EXISTS operations_every ON p2p_sync.operations (stream, stream_sequence) WHERE keeps_every;
CREATE INDEX IF NOT EXISTS operations_by_id ON p2p_sync.operations (operation_id);
CREATE TABLE IF NOT EXISTS p2p_sync.operations_default PARTITION OF p2p_sync.operations DEFAULT;
COMMENT ON TABLE p2p_sync.operations IS 'The log, one partition a day (UTC). Payloads are kept for the retention';
COMMENT ON COLUMN p2p_sync.operations.in_group IS
    'A member of a group: all have the group''s id as `operation_id`, in each stream that the group touches';
COMMENT ON COLUMN p2p_sync.operations.superseded IS 'It came when its path held a newer version; of types kept as latest';
COMMENT ON COLUMN p2p_sync.operations.hub_edit IS 'The last edit by the operator that its path had then, itself included';

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
CREATE INDEX IF NOT EXISTS rejected_by_time ON p2p_sync.rejected_operations (received_at);
COMMENT ON TABLE p2p_sync.rejected_operations IS 'Dead letters: what was refused for good, with the reason told to its host';
COMMENT ON COLUMN p2p_sync.rejected_operations.path IS 'Empty for a group, which has one row';
COMMENT ON COLUMN p2p_sync.rejected_operations.payload IS
    'As it came: may be no JSON, nor text. Of a group its members: [{"path", "account_id", "map", "data"}]';

CREATE TABLE IF NOT EXISTS p2p_sync.limbo_operations (
    limbo_id      bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    host_id       uuid NOT NULL,
    incarnation   bigint NOT NULL,
    sequence      bigint NOT NULL,
    tenure        bigint NOT NULL,
    operation_id  uuid NOT NULL,
    path          text COLLATE "C" NOT NULL,
    data_type     smallint NOT NULL,
    keeps_every   boolean NOT NULL,
    account_id    bigint NOT NULL,
    made_at_ms    bigint NOT NULL,
    deleted       boolean NOT NULL,
    payload       jsonb,
    code          integer NOT NULL,
    reason        text NOT NULL,
    received_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (host_id, incarnation, sequence)
);
CREATE INDEX IF NOT EXISTS limbo_by_operation ON p2p_sync.limbo_operations (host_id, operation_id);
COMMENT ON TABLE p2p_sync.limbo_operations IS
    'What came under a tenure that had passed, until an operator merges or discards it (p2p-sync-proxy limbo)';
COMMENT ON COLUMN p2p_sync.limbo_operations.tenure IS
    'Of its map. 0: made before its host knew of a lease, or of no map. Of a group the oldest';
COMMENT ON COLUMN p2p_sync.limbo_operations.path IS 'Empty for a group, which has one row';
COMMENT ON COLUMN p2p_sync.limbo_operations.payload IS
    'Of a group its members: [{"path", "type", "keeps_every", "account_id", "map", "tenure", "data"}], a deletion without "data"';

CREATE TABLE IF NOT EXISTS p2p_sync.conflicts (
    conflict_id   bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    host_id       uuid NOT NULL,
    path          text COLLATE "C" NOT NULL,
    hub_edit      bigint NOT NULL,
    operation_id  uuid NOT NULL,
    in_group      boolean NOT NULL,
    rule          text NOT NULL CHECK (rule IN ('host', 'newest', 'hub', 'both')),
    operations    bigint NOT NULL,
    members       jsonb NOT NULL,
    recorded_at   timestamptz NOT NULL DEFAULT now(),
    last_at       timestamptz NOT NULL DEFAULT now(),
    resolved_at   timestamptz,
    resolution    text CHECK (resolution IN ('hub', 'host', 'data')),
    UNIQUE (host_id, path, hub_edit)
);
COMMENT ON TABLE p2p_sync.conflicts IS
    'Writes by hosts that had not seen the operator''s last edit of their path: one row for each host, path and edit, with both '
    'values (p2p-sync-proxy ops conflicts). Kept as long as the log; where the rule is both, until it is resolved';
COMMENT ON COLUMN p2p_sync.conflicts.path IS 'Of a group the first member that conflicts';
COMMENT ON COLUMN p2p_sync.conflicts.hub_edit IS 'The edit that the host had not seen';
COMMENT ON COLUMN p2p_sync.conflicts.rule IS 'What the type''s rule made of it; of a group the strictest: both, hub, newest, host';
COMMENT ON COLUMN p2p_sync.conflicts.operations IS
    'How many came so. The host''s value is that of the last, the hub''s the one before the first; of a group both are the first''s';
COMMENT ON COLUMN p2p_sync.conflicts.members IS
    '[{"path", "type", "keeps_every", "conflicts", "hub": {"edit", "vector", "stream_sequence", "account_id", "map", "data"}, '
    '"host": {"account_id", "map", "data"}}], without "data" where it is deleted; "hub" is null where nothing was at the path. '
    'One, or all of a group';

CREATE TABLE IF NOT EXISTS p2p_sync.presence (
    char_id         bigint PRIMARY KEY,
    account_id      bigint NOT NULL,
    map             text COLLATE "C" NOT NULL,
    host_id         uuid NOT NULL,
    tenure          bigint NOT NULL,
    promised_to     uuid,
    promised_until  timestamptz,
    entered_at      timestamptz NOT NULL DEFAULT now(),
    left_at         timestamptz
) WITH (fillfactor = 80);
CREATE INDEX IF NOT EXISTS presence_by_account ON p2p_sync.presence (account_id);
COMMENT ON TABLE p2p_sync.presence IS
    'Which map each character is on, or was on last, and which host writes it. Whoever changes it, or player_tenures, locks '
    'the stream @player first. Never purged: the next tenure is counted from here';
COMMENT ON COLUMN p2p_sync.presence.account_id IS '0: not known';
COMMENT ON COLUMN p2p_sync.presence.tenure IS 'Of the last host that had it; the greatest that the character ever had';
COMMENT ON COLUMN p2p_sync.presence.promised_to IS
    'A ticket: this host may enter the player although another one has it, until promised_until or the account''s next entry';
COMMENT ON COLUMN p2p_sync.presence.left_at IS 'Since then no host has it';

CREATE TABLE IF NOT EXISTS p2p_sync.player_tenures (
    char_id            bigint NOT NULL,
    account_id         bigint NOT NULL,
    tenure             bigint NOT NULL,
    host_id            uuid NOT NULL,
    began_incarnation  bigint NOT NULL,
    began_sequence     bigint NOT NULL,
    ended_incarnation  bigint,
    ended_sequence     bigint,
    ended_at           timestamptz,
    PRIMARY KEY (char_id, host_id, began_incarnation, began_sequence)
) WITH (fillfactor = 80);
CREATE INDEX IF NOT EXISTS player_tenures_by_account
    ON p2p_sync.player_tenures (account_id, host_id, began_incarnation, began_sequence);
CREATE INDEX IF NOT EXISTS player_tenures_ended ON p2p_sync.player_tenures (ended_at) WHERE ended_at IS NOT NULL;
COMMENT ON TABLE p2p_sync.player_tenures IS
    'Which host wrote a player from which of its operations to which. Purged when they ended long ago';
COMMENT ON COLUMN p2p_sync.player_tenures.tenure IS
    '0: the entry went to limbo, or was refused for its account, and what follows it goes to limbo';
COMMENT ON COLUMN p2p_sync.player_tenures.ended_sequence IS
    'The operation by which the host released the player; NULL where it was ended by force';

CREATE TABLE IF NOT EXISTS p2p_sync.account_tenures (
    account_id  bigint PRIMARY KEY,
    tenure      bigint NOT NULL
);
COMMENT ON TABLE p2p_sync.account_tenures IS
    'The greatest tenure that an account had by a character which the operator has said is another''s: its next one is greater. '
    'Never purged';

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
CREATE INDEX IF NOT EXISTS security_validations_locks
    ON p2p_sync.security_validations (host_id, validation_id) WHERE rule = 'automatic_lock';
CREATE INDEX IF NOT EXISTS security_validations_refusals
    ON p2p_sync.security_validations (host_id, rule, validation_id) WHERE verdict = 'refused';
COMMENT ON TABLE p2p_sync.security_validations IS
    'What was found against a host, and by which rule; kept as long as the log';
COMMENT ON COLUMN p2p_sync.security_validations.verdict IS
    'flagged: stored, and suspicious. refused: not stored; refusals by one rule are one row a minute, of the first of them, and '
    'details counts its operations. reported by host: the host''s word about others, never this hub''s verdict';
COMMENT ON COLUMN p2p_sync.security_validations.rule IS
    'Of what was refused the code, or foreign_map or foreign_player; automatic_lock where so many refusals locked the host';

CREATE TABLE IF NOT EXISTS p2p_sync.cache (
    owner       text COLLATE "C" NOT NULL,
    key         text COLLATE "C" NOT NULL,
    value       bytea NOT NULL,
    expires_at  timestamptz,
    PRIMARY KEY (owner, key)
);
COMMENT ON TABLE p2p_sync.cache IS 'What hosts cache, each in a key space of its own. Not yet written by this version';
COMMENT ON COLUMN p2p_sync.cache.owner IS 'A host id, or ''shared'' for the operator''s own, which hosts may only read';

CREATE TABLE IF NOT EXISTS p2p_sync.embedding_space (
    one_row     boolean PRIMARY KEY DEFAULT true CHECK (one_row),
    model       text,
    next_model  text
);
COMMENT ON TABLE p2p_sync.embedding_space IS
    'Whose vectors lie in embeddings: those of two models do not compare. Who writes some locks this row for sharing, and '
    'who changes the model for itself';
COMMENT ON COLUMN p2p_sync.embedding_space.model IS 'NULL until a proxy has embedded something';
COMMENT ON COLUMN p2p_sync.embedding_space.next_model IS
    'Whose vectors p2p-sync-proxy schema reembed is making, in embeddings_next; NULL while it does not';
INSERT INTO p2p_sync.embedding_space DEFAULT VALUES ON CONFLICT DO NOTHING;

CREATE TABLE IF NOT EXISTS p2p_sync.embeddings (
    path             text COLLATE "C" NOT NULL,
    entry            bigint NOT NULL,
    stream_sequence  bigint NOT NULL,
    data_type        smallint NOT NULL,
    map              text COLLATE "C" NOT NULL,
    account_id       bigint NOT NULL,
    received_at      timestamptz NOT NULL,
    content          text NOT NULL,
    content_hash     bytea NOT NULL CHECK (octet_length(content_hash) = 32),
    metadata         jsonb,
    embedding        halfvec(:embedding_dimensions) NOT NULL,
    embedded_at      timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT embeddings_pkey PRIMARY KEY (path, entry)
);
CREATE INDEX IF NOT EXISTS embeddings_by_map ON p2p_sync.embeddings (map);
CREATE INDEX IF NOT EXISTS embeddings_by_time ON p2p_sync.embeddings (received_at);
CREATE INDEX IF NOT EXISTS embeddings_by_content ON p2p_sync.embeddings (content_hash);
CREATE INDEX IF NOT EXISTS embeddings_by_cosine ON p2p_sync.embeddings USING hnsw (embedding halfvec_cosine_ops)
    WITH (m = :hnsw_m, ef_construction = :hnsw_ef_construction);
COMMENT ON TABLE p2p_sync.embeddings IS
    'Texts of operations with their vectors, searched by cosine; and what tools keep under @hub/VECTOR_EMBEDDING/<id>, which is '
    'nowhere else';
COMMENT ON COLUMN p2p_sync.embeddings.content IS 'Empty where a tool gave a vector alone';
COMMENT ON COLUMN p2p_sync.embeddings.entry IS
    '0 for types kept as latest, whose newest text a path has; the operation''s number in its stream for types kept as every';
COMMENT ON COLUMN p2p_sync.embeddings.stream_sequence IS 'Of the operation that the text is of';
COMMENT ON COLUMN p2p_sync.embeddings.content_hash IS
    'SHA-256 of the UTF-8: the same text is asked for once. Another one where a tool gave the vector';
COMMENT ON COLUMN p2p_sync.embeddings.metadata IS 'The payload without what was embedded of it; NULL where that is long';
COMMENT ON COLUMN p2p_sync.embeddings.embedding IS 'Of length 1, in half precision: half the memory, and more dimensions in an index';

CREATE TABLE IF NOT EXISTS p2p_sync.embedding_queue (
    path             text COLLATE "C" NOT NULL,
    entry            bigint NOT NULL,
    stream           text COLLATE "C" NOT NULL,
    stream_sequence  bigint NOT NULL,
    first_sequence   bigint NOT NULL,
    map              text COLLATE "C" NOT NULL,
    attempts         integer NOT NULL DEFAULT 0,
    due_at           timestamptz NOT NULL DEFAULT now(),
    queued_at        timestamptz NOT NULL DEFAULT now(),
    dead_code        integer,
    reason           text,
    PRIMARY KEY (path, entry)
) WITH (fillfactor = 70);
CREATE INDEX IF NOT EXISTS embedding_queue_due ON p2p_sync.embedding_queue (due_at) WHERE dead_code IS NULL;
COMMENT ON TABLE p2p_sync.embedding_queue IS
    'What waits to be embedded: written with the operation, in its transaction. Proxies take rows for a while by setting '
    'due_at ahead, and hold no lock while they ask the provider; whoever locks rows to work on them skips those that are '
    'locked, so that a writer waits for a statement at most';
COMMENT ON COLUMN p2p_sync.embedding_queue.entry IS 'As in embeddings';
COMMENT ON COLUMN p2p_sync.embedding_queue.stream_sequence IS 'Of the newest operation; grows while the row waits';
COMMENT ON COLUMN p2p_sync.embedding_queue.first_sequence IS
    'Of the operation that made the row: what was taken before that belongs to a path that was deleted since';
COMMENT ON COLUMN p2p_sync.embedding_queue.attempts IS 'That failed for the text itself; a provider that is away counts for none';
COMMENT ON COLUMN p2p_sync.embedding_queue.dead_code IS 'Why it is not tried any more, until p2p-sync-proxy embeddings retry';

CREATE TABLE IF NOT EXISTS p2p_sync.embedding_spend (
    spender      uuid PRIMARY KEY,
    day          date NOT NULL,
    tokens       bigint NOT NULL,
    incarnation  bigint NOT NULL DEFAULT 0,
    sequences    bigint[] NOT NULL DEFAULT '{}'
) WITH (fillfactor = 50);
COMMENT ON TABLE p2p_sync.embedding_spend IS
    'Tokens that each host, the queue (the nil UUID) and the tools together (the UUID of ones) have had embedded on a day (UTC), '
    'as the hub counts them';
COMMENT ON COLUMN p2p_sync.embedding_spend.sequences IS
    'The newest 64 messages of the host that cost something: one that is among them, or older than all, is a replay';

CREATE TABLE IF NOT EXISTS p2p_sync.consumers (
    name        text COLLATE "C" PRIMARY KEY CHECK (name ~ '^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$'),
    maps        text[] NOT NULL DEFAULT '{}',
    types       text[] NOT NULL DEFAULT '{}',
    timeline    bigint,
    batch       bigint NOT NULL DEFAULT 0,
    created_at  timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 50);
COMMENT ON TABLE p2p_sync.consumers IS
    'Who brings what is committed here into another database: p2p-sync-proxy feed. Nothing is kept for them longer than for others';
COMMENT ON COLUMN p2p_sync.consumers.maps IS 'Of which streams, * standing for any letters; empty: of all, those that come later included';
COMMENT ON COLUMN p2p_sync.consumers.types IS 'Of which types; empty: of all';
COMMENT ON COLUMN p2p_sync.consumers.timeline IS
    'Of its cursors: where the hub''s is another one, or this is NULL, it begins anew with everything';
COMMENT ON COLUMN p2p_sync.consumers.batch IS
    'The number of the last batch that was handed out, the same changes again included. At least the clock''s milliseconds, so '
    'that it grows also where this database goes back: by it the other one refuses a batch that comes late';

CREATE TABLE IF NOT EXISTS p2p_sync.consumer_cursors (
    consumer       text COLLATE "C" NOT NULL REFERENCES p2p_sync.consumers ON DELETE CASCADE,
    stream         text COLLATE "C" NOT NULL,
    sequence       bigint,
    began_above    bigint NOT NULL,
    moved_at       timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (consumer, stream)
) WITH (fillfactor = 50);
COMMENT ON TABLE p2p_sync.consumer_cursors IS
    'How far each consumer is in each stream that it has begun. Who changes it has taken pg_advisory_lock(consumer_lock(name))';
COMMENT ON COLUMN p2p_sync.consumer_cursors.sequence IS 'All up to here is acknowledged; NULL: the stream begins anew';
COMMENT ON COLUMN p2p_sync.consumer_cursors.began_above IS
    'The floor when the stream was begun from its first position. What was forgotten by then was told to nobody, so that it is not '
    'missed; what is forgotten since, above the cursor, is';

CREATE OR REPLACE VIEW p2p_sync.consumer_streams AS
    SELECT k.consumer, m.stream, m.head, coalesce(f.floor, 0) AS floor, c.sequence, c.began_above, c.moved_at, r.reason AS begins_anew,
            m.head - CASE WHEN r.reason IS NULL THEN coalesce(c.sequence, 0) ELSE 0 END AS behind
        FROM (SELECT name AS consumer, timeline,
                    string_to_array(replace(replace(array_to_string(maps, ','), '_', chr(92) || '_'), '*', '%'), ',') AS patterns
                FROM p2p_sync.consumers OFFSET 0) AS k
        CROSS JOIN p2p_sync.hub AS h
        JOIN p2p_sync.map_states AS m ON m.head > 0 AND (cardinality(k.patterns) = 0 OR m.stream LIKE ANY (k.patterns))
        LEFT JOIN p2p_sync.stream_floors AS f ON f.stream = m.stream
        LEFT JOIN p2p_sync.consumer_cursors AS c
            ON c.consumer = k.consumer AND c.stream = m.stream AND k.timeline = h.timeline
        CROSS JOIN LATERAL (SELECT CASE
            WHEN c.stream IS NULL THEN NULL
            WHEN c.sequence IS NULL THEN 'rewound'
            WHEN c.sequence > m.head THEN 'went back'
            WHEN c.sequence < f.floor AND f.floor > c.began_above THEN 'forgotten' END AS reason) AS r;
COMMENT ON VIEW p2p_sync.consumer_streams IS
    'How far each consumer is in each stream that it reads, of the hub''s present timeline: `sequence` is acknowledged, NULL where it '
    'has yet to begin. Of the `behind` positions up to the head not every one is a change, and not every change of its types';
COMMENT ON COLUMN p2p_sync.consumer_streams.begins_anew IS
    'Why the stream begins anew with a snapshot: rewound; went back, the stream is shorter than it was; forgotten, deletions or '
    'logged operations beyond the cursor are not kept any more';

-- The rows of hot single-row updates are rewritten all the time: cleaned up early, the tables stay in a few pages.
ALTER TABLE p2p_sync.settled_sequences SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000);
ALTER TABLE p2p_sync.map_states SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000);
ALTER TABLE p2p_sync.embedding_queue SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000);

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

-- Notes which Postgres the hub is on, before a connection is used for anything else, and raises the hub's timeline where it is
-- another one than before: a replica that was promoted may lack commits, and so may a backup that was restored.
CREATE OR REPLACE FUNCTION p2p_sync.note_server() RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    v_server text := (SELECT system_identifier FROM pg_control_system()) || '/' || left(pg_walfile_name(pg_current_wal_lsn()), 8);
BEGIN
    IF NOT EXISTS (SELECT FROM p2p_sync.hub WHERE server = v_server) THEN
        -- Asked again by who waited for the row.
        UPDATE p2p_sync.hub SET server = v_server, timeline = timeline + (server IS NOT NULL)::integer
            WHERE server IS DISTINCT FROM v_server;
    END IF;
END $$;

-- What comes after a tenure, or a number of an edit: beyond all that may have been given out and lost since the database went
-- back, of which a million are kept for each of the hub's timelines.
CREATE OR REPLACE FUNCTION p2p_sync.after_number(p_last bigint) RETURNS bigint LANGUAGE sql STABLE AS $$
    SELECT greatest(coalesce(p_last, 0) + 1, (timeline - 1) * 1000000 + 1) FROM p2p_sync.hub;
$$;

-- Of what a host says of itself the members that the hub knows: those of conf/schemas/host_metrics.json.
CREATE OR REPLACE FUNCTION p2p_sync.known_metrics(p_metrics jsonb) RETURNS jsonb LANGUAGE sql IMMUTABLE AS $$
    SELECT coalesce(jsonb_object_agg(key, value), '{}') FROM jsonb_each(p_metrics)
        WHERE key = ANY (ARRAY[
            'cpu_percent', 'cpu_cores', 'ram_total_mb', 'ram_free_mb', 'upload_kbps', 'download_kbps',
            'latency_ms', 'disconnects', 'players', 'maps', 'maps_max'
        ]);
$$;

-- Locks a stream as its writers do, making its row: for whoever changes who may write it.
CREATE OR REPLACE FUNCTION p2p_sync.lock_stream(p_stream text) RETURNS void LANGUAGE sql AS $$
    INSERT INTO p2p_sync.map_states AS m (stream, head, home_hub) SELECT p_stream, 0, hub_id FROM p2p_sync.hub
        ON CONFLICT (stream) DO UPDATE SET head = m.head;
$$;

-- Gives a map to a host: the next tenure, and the end of a hand-over. The host's row, the map's stream and its assignment, if
-- there is one, are locked by the caller, in this order.
CREATE OR REPLACE FUNCTION p2p_sync.pass_map(
    p_map text, p_host uuid, p_lease interval, p_ended_by text, OUT new_tenure bigint, OUT new_until timestamptz
) LANGUAGE plpgsql AS $$
BEGIN
    UPDATE p2p_sync.map_tenures AS t SET ended_at = now(), ended_by = p_ended_by FROM p2p_sync.host_assignments AS a
        WHERE a.map = p_map AND t.map = a.map AND t.tenure = a.tenure AND t.ended_at IS NULL;
    INSERT INTO p2p_sync.host_assignments AS a (map, host_id, tenure, expires_at, granted_at, stream_head)
        SELECT p_map, p_host, p2p_sync.after_number(0), clock_timestamp() + p_lease, clock_timestamp(), head
            FROM p2p_sync.map_states WHERE stream = p_map
        ON CONFLICT (map) DO UPDATE SET
            host_id = excluded.host_id, tenure = p2p_sync.after_number(a.tenure), expires_at = excluded.expires_at,
            granted_at = excluded.granted_at, stream_head = excluded.stream_head,
            backups = array_remove(a.backups, p_host), assistants = array_remove(a.assistants, p_host),
            successor = NULL, catch_up_until = NULL, hand_over_until = NULL
        RETURNING a.tenure, a.expires_at INTO new_tenure, new_until;
    INSERT INTO p2p_sync.map_tenures (map, tenure, host_id) VALUES (p_map, new_tenure, p_host);
    DELETE FROM p2p_sync.host_copies WHERE map = p_map AND host_id = p_host;
END $$;

-- Leaves a map to nobody; stream and assignment are locked by the caller.
CREATE OR REPLACE FUNCTION p2p_sync.drop_map(p_map text) RETURNS void LANGUAGE sql AS $$
    UPDATE p2p_sync.map_tenures AS t SET ended_at = now(), ended_by = 'released' FROM p2p_sync.host_assignments AS a
        WHERE a.map = p_map AND t.map = a.map AND t.tenure = a.tenure AND t.ended_at IS NULL;
    UPDATE p2p_sync.host_assignments
        SET host_id = NULL, expires_at = now(), successor = NULL, catch_up_until = NULL, hand_over_until = NULL
        WHERE map = p_map;
$$;

-- Gives a host the lease of a map: the next tenure, or more time where it is the holder. `granted` is false, and nothing
-- changes, where the host is unknown or not active (`holder` is NULL), or another one's lease runs, or ran at the hub's last
-- note that it serves, and `p_force` is false.
-- Locks are taken in the order hosts, streams, assignments: hosts first as `hello` does, which goes on to what applying
-- locks before the streams.
CREATE OR REPLACE FUNCTION p2p_sync.grant_map(
    p_map text, p_host uuid, p_lease interval, p_force boolean,
    OUT granted boolean, OUT holder uuid, OUT holder_tenure bigint, OUT holder_until timestamptz
) LANGUAGE plpgsql AS $$
DECLARE
    v_runs boolean;
BEGIN
    granted := false;
    PERFORM FROM p2p_sync.hosts WHERE host_id = p_host AND status = 'active' FOR SHARE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    PERFORM p2p_sync.lock_stream(p_map);
    SELECT a.host_id, a.tenure, a.expires_at INTO holder, holder_tenure, holder_until
        FROM p2p_sync.host_assignments AS a WHERE a.map = p_map FOR UPDATE;
    -- Read with the row locked: a note that moves this time has made the lease longer before.
    v_runs := holder_until > (SELECT alive_at FROM p2p_sync.hub);
    IF holder <> p_host AND v_runs AND NOT p_force THEN
        RETURN;
    END IF;
    granted := true;
    IF holder = p_host THEN
        -- Who is given by force what it has keeps it.
        UPDATE p2p_sync.host_assignments SET expires_at = greatest(expires_at, clock_timestamp() + p_lease),
                successor = CASE WHEN NOT p_force THEN successor END,
                catch_up_until = CASE WHEN NOT p_force THEN catch_up_until END,
                hand_over_until = CASE WHEN NOT p_force THEN hand_over_until END
            WHERE map = p_map RETURNING expires_at INTO holder_until;
        RETURN;
    END IF;
    SELECT p_host, new_tenure, new_until INTO holder, holder_tenure, holder_until
        FROM p2p_sync.pass_map(p_map, p_host, p_lease, CASE WHEN v_runs THEN 'taken' ELSE 'lapsed' END);
END $$;

-- Takes a map from its holder, whom it gives; NULL where nobody holds it, or another host than the one given.
CREATE OR REPLACE FUNCTION p2p_sync.release_map(p_map text, p_from uuid DEFAULT NULL) RETURNS uuid LANGUAGE plpgsql AS $$
DECLARE
    v_holder uuid;
BEGIN
    PERFORM p2p_sync.lock_stream(p_map);
    SELECT host_id INTO v_holder FROM p2p_sync.host_assignments WHERE map = p_map FOR UPDATE;
    IF v_holder <> p_from THEN
        RETURN NULL;
    END IF;
    IF v_holder IS NOT NULL THEN
        PERFORM p2p_sync.drop_map(p_map);
    END IF;
    RETURN v_holder;
END $$;

-- Counts a request of a host that changes something; false where it is not newer than the last one, by (incarnation, counter).
CREATE OR REPLACE FUNCTION p2p_sync.count_request(p_host uuid, p_incarnation bigint, p_counter bigint) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO p2p_sync.lease_renewals AS r (host_id, incarnation, counter)
        SELECT host_id, p_incarnation, p_counter FROM p2p_sync.hosts WHERE host_id = p_host AND status = 'active'
        ON CONFLICT (host_id) DO UPDATE
            SET incarnation = excluded.incarnation, counter = excluded.counter, renewed_at = excluded.renewed_at
            WHERE (excluded.incarnation, excluded.counter) > (r.incarnation, r.counter);
    RETURN FOUND;
END $$;

-- Whether a host speaks for others, and so for every map.
CREATE OR REPLACE FUNCTION p2p_sync.has_hub_role(p_host uuid) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT EXISTS (SELECT FROM p2p_sync.hosts WHERE host_id = p_host AND role = 'hub' AND status = 'active');
$$;

-- Whether a host may ask for a map for itself, or for it to be handed to another: by the map's rule.
CREATE OR REPLACE FUNCTION p2p_sync.rule_lets(p_map text, p_host uuid, p_score double precision) RETURNS boolean
LANGUAGE sql STABLE AS $$
    SELECT EXISTS (SELECT FROM p2p_sync.map_rules
        WHERE map = p_map AND (hosts = '{}' OR p_host = ANY (hosts)) AND p_score >= score_min);
$$;

-- Gives a map that nobody holds to a host that asks for it (`p_by`), or to one that a host in the hub's role names. `state` is
-- 'granted', or why not: 'held' (by `holder`), 'not allowed', 'full' (it holds as many maps as it may), 'unknown' host.
CREATE OR REPLACE FUNCTION p2p_sync.ask_for_map(
    p_by uuid, p_map text, p_host uuid, p_score double precision, p_maps_max bigint, p_lease interval,
    OUT state text, OUT holder uuid, OUT holder_tenure bigint
) LANGUAGE plpgsql AS $$
DECLARE
    v_granted boolean;
BEGIN
    PERFORM FROM p2p_sync.hosts WHERE host_id = p_host AND status = 'active' FOR SHARE;
    IF NOT FOUND THEN
        state := 'unknown';
        RETURN;
    END IF;
    IF NOT p2p_sync.has_hub_role(p_by) AND (p_by <> p_host OR NOT p2p_sync.rule_lets(p_map, p_host, p_score)) THEN
        state := 'not allowed';
        RETURN;
    END IF;
    IF (SELECT count(*) FROM p2p_sync.host_assignments WHERE host_id = p_host AND map <> p_map) >= p_maps_max THEN
        state := 'full';
        RETURN;
    END IF;
    SELECT g.granted, g.holder, g.holder_tenure INTO v_granted, holder, holder_tenure
        FROM p2p_sync.grant_map(p_map, p_host, p_lease, false) AS g;
    state := CASE WHEN v_granted THEN 'granted' ELSE 'held' END;
END $$;

-- Begins to hand a map over, on the word of the hub or its operator (`p_by` is NULL), of its holder, or of a host in the hub's
-- role. Where the successor's copy is within `p_near` positions, the holder is asked at once to release it within `p_within`.
-- `state` is 'begun', also where it was before, or why not: 'unknown' (no such active host), 'free' (nobody holds it, or its
-- lease has run out: it is given), 'not holder', 'not allowed' (by the map's rule), 'holds it', 'busy' (the holder was asked to
-- hand it to another).
CREATE OR REPLACE FUNCTION p2p_sync.begin_handover(
    p_by uuid, p_map text, p_to uuid, p_score double precision, p_catch_up interval, p_within interval, p_near bigint,
    OUT state text, OUT holder uuid, OUT holder_tenure bigint
) LANGUAGE plpgsql AS $$
DECLARE
    v_found p2p_sync.host_assignments;
    v_is_near boolean;
BEGIN
    PERFORM FROM p2p_sync.hosts WHERE host_id = p_to AND status = 'active' FOR SHARE;
    IF NOT FOUND THEN
        state := 'unknown';
        RETURN;
    END IF;
    -- Neither host nor tenure changes: no stream is locked.
    SELECT * INTO v_found FROM p2p_sync.host_assignments WHERE map = p_map FOR UPDATE;
    holder := v_found.host_id;
    holder_tenure := v_found.tenure;
    state := CASE
        WHEN p_by <> holder AND NOT p2p_sync.has_hub_role(p_by) THEN 'not holder'
        WHEN holder IS NULL OR v_found.expires_at <= (SELECT alive_at FROM p2p_sync.hub) THEN 'free'
        WHEN p_by = holder AND EXISTS (SELECT FROM p2p_sync.map_rules WHERE map = p_map)
            AND NOT p2p_sync.rule_lets(p_map, p_to, p_score) AND NOT p2p_sync.has_hub_role(p_by) THEN 'not allowed'
        WHEN holder = p_to THEN 'holds it'
        WHEN v_found.successor = p_to THEN 'begun'
        WHEN v_found.hand_over_until IS NOT NULL THEN 'busy'
        -- Who is to give a map up cannot put that off by naming another host again and again.
        WHEN v_found.successor IS NOT NULL AND p_by = holder AND NOT p2p_sync.has_hub_role(p_by) THEN 'busy' END;
    IF state IS NOT NULL THEN
        RETURN;
    END IF;
    v_is_near := EXISTS (SELECT FROM p2p_sync.host_copies AS c JOIN p2p_sync.map_states AS m ON m.stream = c.map
        WHERE c.map = p_map AND c.host_id = p_to AND c.sequence + p_near >= m.head);
    UPDATE p2p_sync.host_assignments SET successor = p_to, catch_up_until = clock_timestamp() + p_catch_up,
            hand_over_until = CASE WHEN v_is_near THEN clock_timestamp() + p_within END,
            backups = CASE WHEN p_to = ANY (backups) THEN backups ELSE backups || p_to END,
            assistants = array_remove(assistants, p_to)
        WHERE map = p_map;
    state := 'begun';
END $$;

-- Asks the holder of a map to hand it over; false where that was done, or the map goes to another or to nobody.
CREATE OR REPLACE FUNCTION p2p_sync.ask_to_hand_over(p_map text, p_successor uuid, p_within interval) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
    UPDATE p2p_sync.host_assignments SET hand_over_until = clock_timestamp() + p_within
        WHERE map = p_map AND successor = p_successor AND hand_over_until IS NULL;
    RETURN FOUND;
END $$;

-- Leaves a map with its holder after all; false where it is not being handed over to that host any more.
CREATE OR REPLACE FUNCTION p2p_sync.cancel_handover(p_map text, p_successor uuid) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    UPDATE p2p_sync.host_assignments SET successor = NULL, catch_up_until = NULL, hand_over_until = NULL
        WHERE map = p_map AND successor = p_successor;
    RETURN FOUND;
END $$;

-- Takes a map from a holder that was asked for it and did not release it in time, and gives it to its successor: false, and
-- nothing changes, where that is not so, or the successor is not active.
CREATE OR REPLACE FUNCTION p2p_sync.end_handover(p_map text, p_successor uuid, p_lease interval) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM FROM p2p_sync.hosts WHERE host_id = p_successor AND status = 'active' FOR SHARE;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM p2p_sync.lock_stream(p_map);
    PERFORM FROM p2p_sync.host_assignments WHERE map = p_map AND successor = p_successor
        AND hand_over_until <= (SELECT alive_at FROM p2p_sync.hub) FOR UPDATE;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM p2p_sync.pass_map(p_map, p_successor, p_lease, 'late');
    RETURN true;
END $$;

-- Releases a map that a host holds under a tenure, on the word of that host or of one in the hub's role; who it is being handed
-- over to has it then. `state` is 'handed over' or 'released', also where that host did it before, or why not: 'not holder',
-- 'stale' (it holds the map under another tenure).
CREATE OR REPLACE FUNCTION p2p_sync.give_map_up(
    p_by uuid, p_map text, p_tenure bigint, p_lease interval, OUT state text, OUT holder uuid, OUT holder_tenure bigint
) LANGUAGE plpgsql AS $$
DECLARE
    v_successor uuid;
    v_ended text;
    v_is_active boolean;
    v_found p2p_sync.host_assignments;
BEGIN
    -- Who has no business with the map gets no lock of it.
    SELECT a.host_id, a.tenure, a.successor INTO holder, holder_tenure, v_successor
        FROM p2p_sync.host_assignments AS a WHERE a.map = p_map;
    v_ended := (SELECT ended_by FROM p2p_sync.map_tenures WHERE map = p_map AND tenure = p_tenure AND host_id = p_by);
    state := CASE
        WHEN v_ended IN ('released', 'handed over') THEN v_ended
        WHEN holder IS NULL OR holder <> p_by AND NOT p2p_sync.has_hub_role(p_by) THEN 'not holder'
        WHEN holder_tenure <> p_tenure THEN 'stale' END;
    IF state IS NOT NULL THEN
        RETURN;
    END IF;
    PERFORM FROM p2p_sync.hosts WHERE host_id = v_successor AND status = 'active' FOR SHARE;
    v_is_active := FOUND;
    PERFORM p2p_sync.lock_stream(p_map);
    SELECT * INTO v_found FROM p2p_sync.host_assignments WHERE map = p_map FOR UPDATE;
    IF v_found.host_id IS DISTINCT FROM holder OR v_found.tenure <> p_tenure THEN
        state := 'not holder';
        holder := v_found.host_id;
        holder_tenure := v_found.tenure;
    ELSIF v_found.successor = v_successor AND v_is_active THEN
        holder := v_successor;
        holder_tenure := (SELECT new_tenure FROM p2p_sync.pass_map(p_map, v_successor, p_lease, 'handed over'));
        state := 'handed over';
    ELSE
        PERFORM p2p_sync.drop_map(p_map);
        holder := NULL;
        state := 'released';
    END IF;
END $$;

-- Says who stands by for a map, as long as it is held under that tenure; a successor stays among them.
CREATE OR REPLACE FUNCTION p2p_sync.set_standby(p_map text, p_tenure bigint, p_backups uuid[], p_assistants uuid[]) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
    UPDATE p2p_sync.host_assignments
        SET backups = CASE WHEN successor IS NULL OR successor = ANY (p_backups) THEN p_backups ELSE p_backups || successor END,
            assistants = p_assistants
        WHERE map = p_map AND tenure = p_tenure AND (host_id = ANY (p_backups || p_assistants)) IS NOT TRUE;
    IF FOUND THEN
        DELETE FROM p2p_sync.host_copies AS c USING p2p_sync.host_assignments AS a
            WHERE a.map = p_map AND c.map = a.map AND NOT c.host_id = ANY (a.backups);
        RETURN true;
    END IF;
    RETURN false;
END $$;

-- Notes how far a host's copies are of the maps that it stands by for; of other maps nothing is taken.
CREATE OR REPLACE FUNCTION p2p_sync.note_copies(p_host uuid, p_maps text[], p_sequences bigint[]) RETURNS void LANGUAGE sql AS $$
    INSERT INTO p2p_sync.host_copies AS c (map, host_id, sequence)
        SELECT t.map, p_host, max(least(t.sequence, coalesce(m.head, 0)))
            FROM unnest(p_maps, p_sequences) AS t(map, sequence)
            JOIN p2p_sync.host_assignments AS a ON a.map = t.map AND p_host = ANY (a.backups)
            LEFT JOIN p2p_sync.map_states AS m ON m.stream = t.map
            GROUP BY t.map ORDER BY t.map
        ON CONFLICT (map, host_id) DO UPDATE SET sequence = excluded.sequence, told_at = now();
$$;

-- What hosts hold (`duty` 0) and are asked to do (as Duty.Role counts), as renewals and notices tell it. `other` is who holds it
-- or, of a hand-over, who is to have it; `left_ms` what is left of the lease, or until the hand-over's end.
CREATE OR REPLACE FUNCTION p2p_sync.standing_of(p_hosts uuid[])
RETURNS TABLE (host uuid, map text, duty smallint, tenure bigint, left_ms bigint, stream_head bigint, other uuid)
LANGUAGE sql STABLE AS $$
    SELECT a.host_id, a.map, 0::smallint, a.tenure,
            greatest(0, floor(extract(epoch FROM a.expires_at - clock_timestamp()) * 1000))::bigint, a.stream_head, NULL::uuid
        FROM p2p_sync.host_assignments AS a WHERE a.host_id = ANY (p_hosts)
    UNION ALL
    SELECT h, a.map, 1::smallint, a.tenure, 0, 0, a.host_id
        FROM p2p_sync.host_assignments AS a CROSS JOIN unnest(a.backups) AS h WHERE a.backups && p_hosts AND h = ANY (p_hosts)
    UNION ALL
    SELECT h, a.map, 2::smallint, a.tenure, 0, 0, a.host_id
        FROM p2p_sync.host_assignments AS a CROSS JOIN unnest(a.assistants) AS h WHERE a.assistants && p_hosts AND h = ANY (p_hosts)
    UNION ALL
    SELECT a.host_id, a.map, 3::smallint, a.tenure,
            greatest(0, floor(extract(epoch FROM a.hand_over_until - clock_timestamp()) * 1000))::bigint, 0, a.successor
        FROM p2p_sync.host_assignments AS a WHERE a.host_id = ANY (p_hosts) AND a.hand_over_until IS NOT NULL
    ORDER BY 2, 3;
$$;

-- Admits, locks or revokes a host, and gives the status that it has now; NULL where there is none. One that is revoked
-- gives its leases up and stays revoked; one that is locked keeps them until they run out, for it cannot renew them.
CREATE OR REPLACE FUNCTION p2p_sync.set_host_status(p_host uuid, p_status text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    v_map text;
    v_was text;
BEGIN
    SELECT status INTO v_was FROM p2p_sync.hosts WHERE host_id = p_host FOR UPDATE;
    IF v_was IS NULL OR v_was = 'revoked' THEN
        RETURN v_was;
    END IF;
    -- Who unlocks a host has looked: whoever asks for the renewal next is its first. What was given out stays good, for the
    -- host may have it.
    UPDATE p2p_sync.hosts SET status = p_status, lock_reason = CASE p_status WHEN 'locked' THEN 'an operator locked it' END,
            next_request_id = CASE WHEN status = 'active' THEN next_request_id END
        WHERE host_id = p_host;
    IF p_status = 'revoked' THEN
        -- Nobody grants it another meanwhile: that waits for the host's row.
        FOR v_map IN SELECT map FROM p2p_sync.host_assignments WHERE host_id = p_host ORDER BY map LOOP
            PERFORM p2p_sync.release_map(v_map, p_host);
        END LOOP;
    END IF;
    RETURN p_status;
END $$;

-- Makes a host of whoever holds an invitation's token, `p_host` under the master key `p_key_id`, and grants it the maps that
-- nobody else holds; whoever comes second waits for the first and finds the token used. `state` is 'enrolled', also for
-- the same public key again, or why not: 'unknown', 'revoked', 'expired', 'used', 'renewed' (its credential was since).
CREATE OR REPLACE FUNCTION p2p_sync.enrol(
    p_token_hash bytea, p_public_key bytea, p_host uuid, p_key_id text, p_lease interval,
    OUT state text, OUT host uuid, OUT key text, OUT granted text[], OUT taken text[]
) LANGUAGE plpgsql AS $$
DECLARE
    v_found p2p_sync.invitations;
    v_map text;
BEGIN
    SELECT * INTO v_found FROM p2p_sync.invitations WHERE token_hash = p_token_hash FOR UPDATE;
    IF NOT FOUND THEN
        state := 'unknown';
        RETURN;
    END IF;
    IF v_found.used_at IS NOT NULL AND v_found.public_key <> p_public_key THEN
        state := 'used';
        RETURN;
    END IF;
    IF v_found.revoked_at IS NOT NULL OR v_found.expires_at <= clock_timestamp() THEN
        state := CASE WHEN v_found.revoked_at IS NOT NULL THEN 'revoked' ELSE 'expired' END;
        RETURN;
    END IF;
    granted := '{}';
    taken := '{}';
    IF v_found.used_at IS NOT NULL THEN
        SELECT CASE WHEN h.status = 'revoked' THEN 'revoked' WHEN h.generation > 1 THEN 'renewed' ELSE 'enrolled' END,
                h.host_id, h.key_id
            INTO state, host, key FROM p2p_sync.hosts AS h WHERE h.host_id = v_found.host_id;
        SELECT coalesce(array_agg(m ORDER BY m) FILTER (WHERE a.host_id = v_found.host_id), '{}'),
                coalesce(array_agg(m ORDER BY m) FILTER (WHERE a.host_id IS DISTINCT FROM v_found.host_id), '{}')
            INTO granted, taken
            FROM unnest(v_found.maps) AS m LEFT JOIN p2p_sync.host_assignments AS a ON a.map = m;
        RETURN;
    END IF;
    INSERT INTO p2p_sync.hosts (host_id, account_id, name, key_id, public_key, role)
        VALUES (p_host, v_found.account_id, v_found.name, p_key_id, p_public_key, v_found.role);
    UPDATE p2p_sync.invitations SET used_at = now(), public_key = p_public_key, host_id = p_host
        WHERE invitation_id = v_found.invitation_id;
    FOR v_map IN SELECT DISTINCT m COLLATE "C" FROM unnest(v_found.maps) AS m ORDER BY 1 LOOP
        IF (SELECT g.granted FROM p2p_sync.grant_map(v_map, p_host, p_lease, false) AS g) THEN
            granted := granted || v_map;
        ELSE
            taken := taken || v_map;
        END IF;
    END LOOP;
    state := 'enrolled';
    host := p_host;
    key := p_key_id;
END $$;

-- Gives a host's next credential: `state` is 'given' with its master key and generation, the same again for the same
-- request; 'none' where none is due (`p_due`) and none was given; 'cloned', and the host is locked, where another request
-- under the same generation was there before, for the host itself repeats its first; or 'unknown'.
CREATE OR REPLACE FUNCTION p2p_sync.renew_credential(
    p_host uuid, p_generation bigint, p_request uuid, p_key_id text, p_due boolean,
    OUT state text, OUT key text, OUT next_generation bigint
) LANGUAGE plpgsql AS $$
DECLARE
    v_found p2p_sync.hosts;
    v_first uuid;
BEGIN
    SELECT * INTO v_found FROM p2p_sync.hosts WHERE host_id = p_host AND status = 'active' FOR UPDATE;
    IF NOT FOUND OR v_found.generation NOT IN (p_generation, p_generation + 1) THEN
        state := 'unknown';
        RETURN;
    END IF;
    next_generation := p_generation + 1;
    IF v_found.generation = p_generation THEN
        v_first := v_found.next_request_id;
        key := v_found.next_key_id;
    ELSE
        v_first := v_found.renewed_by;
        key := v_found.key_id;
    END IF;
    IF v_first IS NULL AND v_found.generation <> p_generation THEN
        -- Nobody knows any more whose request it was.
        state := 'unknown';
    ELSIF v_first IS NULL THEN
        state := 'none';
        IF p_due OR key IS NOT NULL THEN
            key := coalesce(key, p_key_id);
            UPDATE p2p_sync.hosts SET next_key_id = key, next_request_id = p_request WHERE host_id = p_host;
            state := 'given';
        END IF;
    ELSIF v_first = p_request THEN
        state := 'given';
    ELSE
        state := 'cloned';
        UPDATE p2p_sync.hosts SET status = 'locked',
                lock_reason = 'its credential was renewed from two places: there is a copy of it'
            WHERE host_id = p_host;
    END IF;
END $$;

-- Renews all leases of a host, run out or not. A repetition of an earlier renewal, or of another request, gives false and
-- changes nothing.
CREATE OR REPLACE FUNCTION p2p_sync.renew_leases(p_host uuid, p_incarnation bigint, p_counter bigint, p_lease interval)
RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    IF NOT p2p_sync.count_request(p_host, p_incarnation, p_counter) THEN
        RETURN false;
    END IF;
    -- Host and tenure stay, so that no stream has to be locked; sorted, as all who lock several.
    PERFORM FROM p2p_sync.host_assignments WHERE host_id = p_host ORDER BY map FOR UPDATE;
    UPDATE p2p_sync.host_assignments SET expires_at = greatest(expires_at, clock_timestamp() + p_lease)
        WHERE host_id = p_host;
    RETURN true;
END $$;

-- Notes that the hub serves. Where that was not noted for longer than `p_gap`, the hub was away, and leases that ran when
-- it went are longer by that time, and who was asked to hand a map over has as much more; how long it was is given. No lease
-- runs longer than `p_lease` from now for it: one that was renewed since the hub came back has its time already.
CREATE OR REPLACE FUNCTION p2p_sync.note_alive(p_gap interval, p_lease interval) RETURNS interval LANGUAGE plpgsql AS $$
DECLARE
    v_alive_at timestamptz;
    v_away interval;
BEGIN
    SELECT alive_at INTO v_alive_at FROM p2p_sync.hub FOR UPDATE;
    v_away := greatest(clock_timestamp() - v_alive_at, interval '0');
    IF v_away > p_gap THEN
        PERFORM FROM p2p_sync.host_assignments WHERE host_id IS NOT NULL ORDER BY map FOR UPDATE;
        UPDATE p2p_sync.host_assignments
            SET expires_at = CASE WHEN expires_at > v_alive_at
                    THEN greatest(expires_at, least(expires_at + v_away, clock_timestamp() + p_lease)) ELSE expires_at END,
                hand_over_until = hand_over_until + v_away
            WHERE host_id IS NOT NULL AND (expires_at > v_alive_at OR hand_over_until > v_alive_at);
    END IF;
    UPDATE p2p_sync.hub SET alive_at = clock_timestamp();
    RETURN v_away;
END $$;

-- The tenure at which a player's path is written now: its character's, or the greatest of its account's characters', those
-- included that were its own by mistake.
CREATE OR REPLACE FUNCTION p2p_sync.player_tenure(p_path text) RETURNS bigint LANGUAGE sql STABLE AS $$
    SELECT CASE
        WHEN p_path LIKE '@char/%' THEN
            (SELECT tenure FROM p2p_sync.presence WHERE char_id = split_part(p_path, '/', 2)::bigint)
        WHEN p_path LIKE '@account/%' THEN
            (SELECT greatest(max(p.tenure),
                    (SELECT a.tenure FROM p2p_sync.account_tenures AS a WHERE a.account_id = split_part(p_path, '/', 2)::bigint))
                FROM p2p_sync.presence AS p WHERE p.account_id = nullif(split_part(p_path, '/', 2)::bigint, 0)) END;
$$;

-- Notes that a host released a character at one of its operations. A host that has lost the lease of the map where the
-- character was cannot release it any more: then its tenure ends by force.
CREATE OR REPLACE FUNCTION p2p_sync.leave_player(p_host uuid, p_incarnation bigint, p_sequence bigint, p_char bigint) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_tenure bigint;
    v_is_holder boolean;
BEGIN
    SELECT p.tenure, coalesce(a.host_id = p_host, false) INTO v_tenure, v_is_holder
        FROM p2p_sync.presence AS p LEFT JOIN p2p_sync.host_assignments AS a ON a.map = p.map
        WHERE p.char_id = p_char AND p.host_id = p_host;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    IF v_is_holder THEN
        -- A second release moves the first; what was ended by force stays so.
        UPDATE p2p_sync.player_tenures
            SET ended_incarnation = p_incarnation, ended_sequence = p_sequence, ended_at = now()
            WHERE char_id = p_char AND host_id = p_host AND tenure = v_tenure
                AND (began_incarnation, began_sequence) < (p_incarnation, p_sequence)
                AND (ended_at IS NULL OR (ended_incarnation, ended_sequence) < (p_incarnation, p_sequence));
    ELSE
        UPDATE p2p_sync.player_tenures SET ended_at = now()
            WHERE char_id = p_char AND host_id = p_host AND tenure = v_tenure
                AND (began_incarnation, began_sequence) < (p_incarnation, p_sequence) AND ended_at IS NULL;
    END IF;
    IF FOUND THEN
        UPDATE p2p_sync.presence SET left_at = now() WHERE char_id = p_char AND left_at IS NULL;
    END IF;
END $$;

-- Who has a player that a host is to get, and every character of its account with it, for an account is in the game with one
-- at a time: the greatest tenure of these, whether any host was given a ticket for one, whether this host has a ticket that is
-- good still, whether another host has one, and whether that one keeps it, for its lease of the map runs.
CREATE OR REPLACE FUNCTION p2p_sync.who_has(p_host uuid, p_char bigint, p_account bigint)
RETURNS TABLE (greatest_tenure bigint, has_tickets boolean, is_promised boolean, is_elsewhere boolean, is_held boolean)
LANGUAGE sql STABLE ROWS 1 AS $$
    SELECT greatest(max(there.tenure), (SELECT tenure FROM p2p_sync.account_tenures WHERE account_id = p_account), 0),
            coalesce(bool_or(there.promised_to IS NOT NULL), false),
            coalesce(bool_or(there.promised_to = p_host AND there.promised_until > clock_timestamp()), false),
            coalesce(bool_or(there.is_elsewhere), false),
            coalesce(bool_or(there.is_elsewhere AND a.host_id = there.host_id
                AND a.expires_at > (SELECT alive_at FROM p2p_sync.hub) AND h.status = 'active'), false)
        FROM (SELECT *, host_id <> p_host AND left_at IS NULL AS is_elsewhere FROM p2p_sync.presence
            WHERE char_id = p_char OR account_id = nullif(p_account, 0)) AS there
        LEFT JOIN p2p_sync.host_assignments AS a ON a.map = there.map
        LEFT JOIN p2p_sync.hosts AS h ON h.host_id = there.host_id;
$$;

-- Moves a character onto a map of a host, by one of its operations. `verdict`: 0 it is there; 1 too early, for another host
-- has the player; 2 to limbo, for the map's lease has passed on; 3 refused, for the host never held that; 4 refused, for the
-- character is of another account; 5 refused, for the account has 32 others. What follows one that went to limbo goes there
-- too, and so does what follows one that was refused for its account, about which an honest host may be the one that is right.
-- A host that has the player already keeps its tenure; otherwise the next one begins, which is greater than any that the
-- character, or its account, ever had.
CREATE OR REPLACE FUNCTION p2p_sync.enter_player(
    p_host uuid, p_incarnation bigint, p_sequence bigint, p_char bigint, p_account bigint, p_map text, OUT verdict smallint
) LANGUAGE plpgsql AS $$
DECLARE
    v_there p2p_sync.presence;
    v_account bigint;
    v_greatest bigint;
    v_has_tickets boolean;
    v_is_promised boolean;
    v_is_elsewhere boolean;
    v_is_held boolean;
    v_stays boolean := false;
BEGIN
    SELECT * INTO v_there FROM p2p_sync.presence WHERE char_id = p_char;
    v_account := coalesce(nullif(p_account, 0), v_there.account_id, 0);
    IF NOT EXISTS (SELECT FROM p2p_sync.host_assignments WHERE map = p_map AND host_id = p_host) THEN
        verdict := 3;
        IF EXISTS (SELECT FROM p2p_sync.map_tenures WHERE map = p_map AND host_id = p_host) THEN
            verdict := 2;
            -- By the host's own word the player has left where it was.
            PERFORM p2p_sync.leave_player(p_host, p_incarnation, p_sequence, p_char);
        END IF;
    ELSIF v_there.account_id <> 0 AND v_there.account_id <> v_account THEN
        verdict := 4;
    -- All of an account's are looked at below, under the lock that all players' writers wait for.
    ELSIF v_account <> 0 AND v_there.account_id IS DISTINCT FROM v_account
        AND (SELECT count(*) FROM (SELECT FROM p2p_sync.presence WHERE account_id = v_account LIMIT 32) AS others) = 32
    THEN
        verdict := 5;
    END IF;
    IF verdict IN (2, 4, 5) THEN
        INSERT INTO p2p_sync.player_tenures (char_id, account_id, tenure, host_id, began_incarnation, began_sequence, ended_at)
            VALUES (p_char, v_account, 0, p_host, p_incarnation, p_sequence, now());
    END IF;
    IF verdict IS NOT NULL THEN
        RETURN;
    END IF;

    SELECT * INTO v_greatest, v_has_tickets, v_is_promised, v_is_elsewhere, v_is_held
        FROM p2p_sync.who_has(p_host, p_char, v_account);
    IF v_is_held AND NOT v_is_promised THEN
        verdict := 1;
        RETURN;
    END IF;
    IF v_is_elsewhere OR v_has_tickets THEN
        UPDATE p2p_sync.player_tenures AS t SET ended_at = now() FROM p2p_sync.presence AS there
            WHERE (there.char_id = p_char OR there.account_id = nullif(v_account, 0)) AND there.host_id <> p_host
                AND t.char_id = there.char_id AND t.host_id = there.host_id AND t.tenure = there.tenure AND t.ended_at IS NULL;
        UPDATE p2p_sync.presence SET left_at = CASE WHEN host_id = p_host THEN left_at ELSE coalesce(left_at, now()) END,
                promised_to = NULL, promised_until = NULL
            WHERE char_id = p_char OR account_id = nullif(v_account, 0);
    END IF;

    IF v_there.host_id = p_host AND v_there.tenure = v_greatest AND v_there.account_id = v_account THEN
        -- Not where it was ended by force, nor behind an entry that went to limbo.
        UPDATE p2p_sync.player_tenures AS t
            SET account_id = v_account, ended_incarnation = NULL, ended_sequence = NULL, ended_at = NULL
            WHERE t.char_id = p_char AND t.host_id = p_host AND t.tenure = v_greatest
                AND (t.ended_at IS NULL OR t.ended_sequence IS NOT NULL)
                AND NOT EXISTS (SELECT FROM p2p_sync.player_tenures AS later
                    WHERE (later.char_id = p_char OR later.account_id = nullif(v_account, 0)) AND later.host_id = p_host
                        AND (later.began_incarnation, later.began_sequence) > (t.began_incarnation, t.began_sequence));
        v_stays := FOUND;
    END IF;
    IF NOT v_stays THEN
        v_greatest := p2p_sync.after_number(v_greatest);
        UPDATE p2p_sync.player_tenures SET ended_incarnation = p_incarnation, ended_sequence = p_sequence, ended_at = now()
            WHERE char_id = p_char AND host_id = p_host AND ended_at IS NULL;
        INSERT INTO p2p_sync.player_tenures (char_id, account_id, tenure, host_id, began_incarnation, began_sequence)
            VALUES (p_char, v_account, v_greatest, p_host, p_incarnation, p_sequence);
    END IF;
    INSERT INTO p2p_sync.presence AS p (char_id, account_id, map, host_id, tenure)
        VALUES (p_char, v_account, p_map, p_host, v_greatest)
        ON CONFLICT (char_id) DO UPDATE SET
            account_id = excluded.account_id, map = excluded.map, host_id = excluded.host_id, tenure = excluded.tenure,
            entered_at = excluded.entered_at, left_at = NULL;
    verdict := 0;
END $$;

-- The operator's word that no host has a player any more, so that the next entry moves it, and that no ticket is good; gives
-- the host that had it, NULL where none did. What that one still sends goes to limbo.
CREATE OR REPLACE FUNCTION p2p_sync.release_player(p_char bigint) RETURNS uuid LANGUAGE plpgsql AS $$
DECLARE
    v_host uuid;
    v_tenure bigint;
BEGIN
    PERFORM p2p_sync.lock_stream('@player');
    UPDATE p2p_sync.presence SET left_at = now() WHERE char_id = p_char AND left_at IS NULL
        RETURNING host_id, tenure INTO v_host, v_tenure;
    UPDATE p2p_sync.player_tenures SET ended_at = now()
        WHERE char_id = p_char AND host_id = v_host AND tenure = v_tenure AND ended_at IS NULL;
    UPDATE p2p_sync.presence SET promised_to = NULL, promised_until = NULL
        WHERE promised_to IS NOT NULL AND (char_id = p_char
            OR account_id = (SELECT nullif(account_id, 0) FROM p2p_sync.presence WHERE char_id = p_char));
    RETURN v_host;
END $$;

-- The operator's word whose a character is; 0 leaves that to who enters it next. No host has it any more, and what hosts still
-- send of it goes to limbo, what they made before they released it too, for it may be written to the account that was wrong.
-- `state` is 'set', with the host that had it, or why not: 'unknown' (it was never seen), 'full' (the account has 32 others).
CREATE OR REPLACE FUNCTION p2p_sync.set_player_account(p_char bigint, p_account bigint, OUT state text, OUT host uuid)
LANGUAGE plpgsql AS $$
DECLARE
    v_there p2p_sync.presence;
BEGIN
    PERFORM p2p_sync.lock_stream('@player');
    SELECT * INTO v_there FROM p2p_sync.presence WHERE char_id = p_char;
    state := CASE
        WHEN v_there.char_id IS NULL THEN 'unknown'
        WHEN p_account NOT IN (0, v_there.account_id)
            AND (SELECT count(*) FROM p2p_sync.presence WHERE account_id = p_account) >= 32 THEN 'full'
        ELSE 'set' END;
    IF state <> 'set' OR v_there.account_id = p_account THEN
        RETURN;
    END IF;
    host := p2p_sync.release_player(p_char);
    UPDATE p2p_sync.player_tenures
        SET ended_incarnation = NULL, ended_sequence = NULL, ended_at = coalesce(ended_at, now()) WHERE char_id = p_char;
    -- What was written to the one account stays older than what is written next, and who plays the other one now goes on.
    IF v_there.account_id <> 0 THEN
        INSERT INTO p2p_sync.account_tenures AS a (account_id, tenure) VALUES (v_there.account_id, v_there.tenure)
            ON CONFLICT (account_id) DO UPDATE SET tenure = greatest(a.tenure, excluded.tenure);
    END IF;
    IF p_account <> 0 THEN
        UPDATE p2p_sync.player_tenures AS t SET tenure = v_there.tenure FROM p2p_sync.presence AS p
            WHERE p.account_id = p_account AND p.left_at IS NULL AND p.tenure < v_there.tenure
                AND t.char_id = p.char_id AND t.host_id = p.host_id AND t.tenure = p.tenure AND t.ended_at IS NULL;
        UPDATE p2p_sync.presence SET tenure = v_there.tenure
            WHERE account_id = p_account AND left_at IS NULL AND tenure < v_there.tenure;
    END IF;
    UPDATE p2p_sync.presence SET account_id = p_account WHERE char_id = p_char;
END $$;

-- A ticket: for 10 minutes the host may enter the player although another one has it; whoever enters it, or another character
-- of its account, uses it up. False where the host is unknown or not active, or the player was never seen.
CREATE OR REPLACE FUNCTION p2p_sync.promise_player(p_char bigint, p_host uuid) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM FROM p2p_sync.hosts WHERE host_id = p_host AND status = 'active' FOR SHARE;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM p2p_sync.lock_stream('@player');
    UPDATE p2p_sync.presence SET promised_to = p_host, promised_until = clock_timestamp() + interval '10 minutes'
        WHERE char_id = p_char;
    RETURN FOUND;
END $$;

-- The stream that numbers what is written to a path.
CREATE OR REPLACE FUNCTION p2p_sync.stream_of(p_path text) RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN p_path LIKE '@char/%' OR p_path LIKE '@account/%' THEN '@player'
        WHEN p_path LIKE '@host/%' THEN '@host' ELSE split_part(p_path, '/', 1) END COLLATE "C";
$$;

-- The advisory lock that the one reader of a consumer holds, for as long as its session lasts.
CREATE OR REPLACE FUNCTION p2p_sync.consumer_lock(p_consumer text) RETURNS bigint LANGUAGE sql IMMUTABLE AS $$
    SELECT hashtextextended('p2p_sync consumer ' || p_consumer, 0);
$$;

-- Who holds it, for people; NULL where nobody does.
CREATE OR REPLACE FUNCTION p2p_sync.consumer_reader(p_consumer text) RETURNS text LANGUAGE sql STABLE AS $$
    SELECT coalesce(nullif(a.application_name, ''), 'the session ' || l.pid)
            || coalesce(' at ' || host(a.client_addr), '')
            || coalesce(' since ' || to_char(a.backend_start AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'), '')
        FROM pg_locks AS l LEFT JOIN pg_stat_activity AS a USING (pid)
        WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
            AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
            AND (l.classid::bigint << 32 | l.objid::bigint) = p2p_sync.consumer_lock(p_consumer)
        LIMIT 1;
$$;

-- Writes a path as an edit of the operator's, NULL deletes it: at the end of its stream, newer than what is there and at the
-- tenure of the map's or the player's host, under a number that no edit had before, which it gives. All of the operator's
-- writing goes this way, and none of it moves a player. Who writes several paths does it in the order of their streams; the
-- hub's row, which is locked first, has all edits wait for one another.
--   p_account_id, p_map   NULL: as the path has them
--   p_tenure, p_host, p_incarnation, p_sequence   of a host's operation that the operator makes an own one
CREATE OR REPLACE FUNCTION p2p_sync.write_edit(
    p_path text, p_data_type smallint, p_keeps_every boolean, p_payload jsonb, p_account_id bigint, p_map text,
    p_operation_id uuid, p_in_group boolean, p_made_at_ms bigint,
    p_tenure bigint DEFAULT 0, p_host uuid DEFAULT '00000000-0000-0000-0000-000000000000', p_incarnation bigint DEFAULT 0,
    p_sequence bigint DEFAULT NULL
) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    v_stream text := p2p_sync.stream_of(p_path);
    v_hub uuid;
    v_edit bigint;
    v_number bigint;
    v_there record;
    v_tenure bigint;
BEGIN
    UPDATE p2p_sync.hub SET edits = p2p_sync.after_number(edits) RETURNING hub_id, edits INTO v_hub, v_edit;
    INSERT INTO p2p_sync.map_states AS m (stream, head, home_hub) VALUES (v_stream, 1, v_hub)
        ON CONFLICT (stream) DO UPDATE SET head = m.head + 1
        RETURNING head INTO v_number;
    SELECT tenure, hub_edit, account_id, map INTO v_there FROM p2p_sync.states WHERE path = p_path;
    IF v_there.hub_edit >= v_edit THEN
        -- Someone raised it by hand.
        v_edit := v_there.hub_edit + 1;
        UPDATE p2p_sync.hub SET edits = v_edit;
    END IF;
    -- Never older than what its path has, nor than what the map's or the player's host writes: an edit is of today.
    SELECT greatest(p_tenure, v_there.tenure, p2p_sync.player_tenure(p_path), max(tenure)) INTO v_tenure
        FROM p2p_sync.host_assignments WHERE map = v_stream;
    p_account_id := coalesce(p_account_id, v_there.account_id, 0);
    p_map := coalesce(p_map, v_there.map, CASE WHEN v_stream LIKE '@%' THEN '' ELSE v_stream END);
    p_sequence := coalesce(p_sequence, v_edit);
    INSERT INTO p2p_sync.states AS s (path, stream, stream_sequence, data_type, keeps_every, tenure, incarnation, sequence,
            host_id, operation_id, in_group, account_id, map, deleted, payload, received_at, logged_at, hub_edit, origin_hub,
            version_vector)
        VALUES (p_path, v_stream, v_number, p_data_type, p_keeps_every, v_tenure, p_incarnation, p_sequence, p_host,
            p_operation_id, p_in_group, p_account_id, p_map, p_payload IS NULL, p_payload, now(), now(), v_edit, v_hub,
            jsonb_build_object(v_hub, v_edit))
        ON CONFLICT (path) DO UPDATE SET
            stream_sequence = excluded.stream_sequence, data_type = excluded.data_type,
            keeps_every = excluded.keeps_every, tenure = excluded.tenure, incarnation = excluded.incarnation,
            sequence = excluded.sequence, host_id = excluded.host_id, operation_id = excluded.operation_id,
            in_group = excluded.in_group, account_id = excluded.account_id, map = excluded.map, deleted = excluded.deleted,
            payload = excluded.payload, received_at = excluded.received_at, logged_at = excluded.logged_at,
            hub_edit = excluded.hub_edit, origin_hub = excluded.origin_hub,
            version_vector = s.version_vector || excluded.version_vector;
    INSERT INTO p2p_sync.operations (stream, stream_sequence, received_at, operation_id, in_group, path, data_type,
            keeps_every, tenure, incarnation, sequence, host_id, account_id, map, deleted, payload, made_at_ms, superseded,
            origin_hub, hub_edit)
        VALUES (v_stream, v_number, now(), p_operation_id, p_in_group, p_path, p_data_type, p_keeps_every, v_tenure,
            p_incarnation, p_sequence, p_host, p_account_id, p_map, p_payload IS NULL, p_payload, p_made_at_ms, false, v_hub,
            v_edit);
    RETURN v_edit;
END $$;

-- Writes what lies in limbo as the operator's edit, in the order of its streams, and takes it out of limbo; false where
-- there is no such row. No player is moved by it.
CREATE OR REPLACE FUNCTION p2p_sync.merge_limbo(p_limbo_id bigint) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    v_limbo p2p_sync.limbo_operations;
    v_member record;
BEGIN
    DELETE FROM p2p_sync.limbo_operations WHERE limbo_id = p_limbo_id RETURNING * INTO v_limbo;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    FOR v_member IN
        SELECT m.*
            FROM (SELECT v_limbo.path AS path, v_limbo.data_type AS data_type, v_limbo.keeps_every AS keeps_every,
                        v_limbo.account_id AS account_id, split_part(v_limbo.path, '/', 1) AS map, v_limbo.tenure AS tenure,
                        v_limbo.payload AS payload, false AS in_group
                    WHERE v_limbo.path <> ''
                UNION ALL SELECT e ->> 'path', (e ->> 'type')::smallint, (e ->> 'keeps_every')::boolean,
                        (e ->> 'account_id')::bigint, e ->> 'map', (e ->> 'tenure')::bigint, e -> 'data', true
                    FROM jsonb_array_elements(CASE WHEN v_limbo.path = '' THEN v_limbo.payload ELSE '[]' END) AS e) AS m
            ORDER BY p2p_sync.stream_of(path), path COLLATE "C"
    LOOP
        PERFORM p2p_sync.write_edit(v_member.path, v_member.data_type, v_member.keeps_every, v_member.payload,
            v_member.account_id, v_member.map, v_limbo.operation_id, v_member.in_group, v_limbo.made_at_ms, v_member.tenure,
            v_limbo.host_id, v_limbo.incarnation, v_limbo.sequence);
    END LOOP;
    RETURN true;
END $$;

-- Takes something out of limbo without writing it; it becomes a dead letter, so that its host is told so if it asks.
CREATE OR REPLACE FUNCTION p2p_sync.discard_limbo(p_limbo_id bigint, p_reason text) RETURNS boolean LANGUAGE sql AS $$
    WITH discarded AS (DELETE FROM p2p_sync.limbo_operations WHERE limbo_id = p_limbo_id RETURNING *), kept AS (
        INSERT INTO p2p_sync.rejected_operations
                (host_id, incarnation, sequence, operation_id, path, data_type, code, reason, payload)
            SELECT host_id, incarnation, sequence, operation_id, path, data_type, code, p_reason,
                    convert_to(coalesce(payload::text, ''), 'UTF8')
                FROM discarded
            RETURNING 1
    )
    SELECT EXISTS (SELECT FROM kept);
$$;

-- Gives back the numbers of streams to which nothing of `p_left` is written, and the rows of streams that were made for them:
-- what a host has no right to write leaves no trace among what it would write to. Called by apply_batch, which has locked
-- the streams whose count is not 0, so that nobody was given numbers since.
CREATE OR REPLACE FUNCTION p2p_sync.give_back(
    p_streams text[], p_stream_counts bigint[], p_stream_of integer[], p_sequences bigint[], p_left int8multirange
) RETURNS void LANGUAGE sql AS $$
    UPDATE p2p_sync.map_states AS m SET head = m.head - s.count
        FROM unnest(p_streams, p_stream_counts) WITH ORDINALITY AS s(stream, count, place)
        WHERE m.stream = s.stream AND s.count > 0 AND NOT EXISTS (
            SELECT FROM unnest(p_sequences, p_stream_of) AS o(sequence, stream_of)
                WHERE o.stream_of = s.place AND p_left @> o.sequence);
    DELETE FROM p2p_sync.map_states AS m USING unnest(p_streams, p_stream_counts) AS s(stream, count)
        WHERE m.stream = s.stream AND s.count > 0 AND m.head = 0
            AND NOT EXISTS (SELECT FROM p2p_sync.host_assignments AS a WHERE a.map = m.stream);
$$;

-- Finds, of the operations in `p_new`, those on maps that their host has no right to write: whose tenure is not the one that
-- `p_allowed` has for their stream. What was made while the host held the map, or before it knew that it would (tenure 0, of
-- a map that it holds or held), is for limbo; what never was its to write is to be refused. The worst come first.
CREATE OR REPLACE FUNCTION p2p_sync.judge_maps(
    p_host uuid, p_new int8multirange, p_allowed bigint[], p_streams text[],
    p_sequences bigint[], p_stream_of integer[], p_tenures bigint[], p_not_holder_code integer, p_stale_tenure_code integer,
    OUT sequences bigint[], OUT codes integer[], OUT reasons text[], OUT limbo boolean[]
) LANGUAGE plpgsql AS $$
BEGIN
    WITH judged AS (
        SELECT o.sequence, o.stream, o.tenure, a.host_id AS holder, a.tenure AS current_tenure,
                EXISTS (SELECT FROM p2p_sync.map_tenures AS t
                    WHERE t.host_id = p_host AND t.map = o.stream AND (o.tenure = 0 OR t.tenure = o.tenure)) AS was_its
            FROM (SELECT DISTINCT sequence, tenure, p_streams[stream_of] AS stream
                FROM unnest(p_sequences, p_tenures, p_stream_of) AS given(sequence, tenure, stream_of)
                WHERE tenure <> p_allowed[stream_of] AND p_new @> sequence) AS o
            LEFT JOIN p2p_sync.host_assignments AS a ON a.map = o.stream
            ORDER BY o.sequence, was_its, o.tenure, o.stream
    )
    SELECT array_agg(sequence),
            array_agg(CASE WHEN was_its THEN p_stale_tenure_code ELSE p_not_holder_code END),
            array_agg(CASE
                WHEN was_its THEN format('this host''s lease of %s was not in force when this was made or had passed on before '
                    'it came (tenure %s, now %s): it is kept apart until the hub''s operator merges or discards it',
                    stream, tenure, current_tenure)
                WHEN holder = p_host THEN format('this host holds the lease of %s under tenure %s and never held it under %s',
                    stream, current_tenure, tenure)
                WHEN holder IS NULL THEN format('nobody holds the lease of %s: ask the hub''s operator for it '
                    '(p2p-sync-proxy maps assign)', stream)
                ELSE format('host %s holds the lease of %s, not this host', holder, stream) END),
            array_agg(was_its)
        INTO sequences, codes, reasons, limbo
        FROM judged;
END $$;

-- Finds, of the operations in `p_new`, comings of players whom another host keeps. No lock is held, so that who asks for such a
-- player again and again holds nobody up: what has changed meanwhile the next try finds. What is not to wait but to be
-- refused, or for limbo, is left to enter_player.
CREATE OR REPLACE FUNCTION p2p_sync.find_early(
    p_host uuid, p_new int8multirange, p_sequences bigint[], p_paths text[], p_data_types smallint[], p_account_ids bigint[],
    p_maps text[], p_payloads jsonb[]
) RETURNS bigint[] LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN (SELECT array_agg(o.sequence)
        FROM (SELECT given.*, CASE WHEN data_type = 12 AND path LIKE '@char/%' THEN split_part(path, '/', 2)::bigint END AS char_id
            FROM unnest(p_sequences, p_paths, p_data_types, p_account_ids, p_maps, p_payloads)
                AS given(sequence, path, data_type, account_id, map, payload)
            WHERE p_new @> sequence) AS o
        LEFT JOIN p2p_sync.presence AS p ON p.char_id = o.char_id
        CROSS JOIN LATERAL (SELECT coalesce(nullif(o.account_id, 0), p.account_id, 0) AS id) AS account
        CROSS JOIN LATERAL p2p_sync.who_has(p_host, o.char_id, account.id) AS has
        WHERE o.char_id IS NOT NULL AND o.payload ->> 'event' IS DISTINCT FROM 'leave'
            AND has.is_held AND NOT has.is_promised
            AND EXISTS (SELECT FROM p2p_sync.host_assignments AS a WHERE a.map = o.map AND a.host_id = p_host)
            AND coalesce(p.account_id, 0) IN (0, account.id)
            AND (account.id = 0 OR p.account_id = account.id
                OR (SELECT count(*) FROM (SELECT FROM p2p_sync.presence WHERE account_id = account.id LIMIT 32) AS others) < 32));
END $$;

-- Leaves the operations in `p_early` unsettled, and with them all of `p_new` that follows one, what was refused included: `held`
-- are these, `remaining` is the rest. Called by apply_batch, which has settled all of `p_new`, and kept what was refused of it.
CREATE OR REPLACE FUNCTION p2p_sync.hold_back(
    p_host uuid, p_incarnation bigint, p_new int8multirange, p_early bigint[],
    p_followers bigint[], p_predecessor_incarnations bigint[], p_predecessors bigint[],
    OUT held bigint[], OUT remaining int8multirange
) LANGUAGE plpgsql AS $$
DECLARE
    v_operation record;
    v_held int8multirange := '{}';
BEGIN
    FOR v_operation IN
        SELECT e.sequence, NULL::bigint AS predecessor FROM unnest(p_early) AS e(sequence)
        UNION ALL
        SELECT f.sequence, f.predecessor
            FROM unnest(p_followers, p_predecessor_incarnations, p_predecessors)
                AS f(sequence, predecessor_incarnation, predecessor)
            WHERE f.predecessor_incarnation = p_incarnation AND p_new @> f.sequence
        ORDER BY sequence
    LOOP
        CONTINUE WHEN NOT v_held @> v_operation.predecessor OR v_held @> v_operation.sequence;
        v_held := v_held + int8multirange(int8range(v_operation.sequence, v_operation.sequence, '[]'));
        held := held || v_operation.sequence;
    END LOOP;
    UPDATE p2p_sync.settled_sequences AS s SET settled = s.settled - v_held
        WHERE s.host_id = p_host AND s.incarnation = p_incarnation;
    DELETE FROM p2p_sync.rejected_operations
        WHERE host_id = p_host AND incarnation = p_incarnation AND sequence = ANY (held);
    remaining := p_new - v_held;
END $$;

-- Moves players by the presence operations in `p_new`, in their order. `early` are those that have to be sent again, for
-- another host has the player, and what follows one of them; where they may not wait (`p_may_wait`), those of which another
-- host has the player go to limbo. The rest of the answer is as of judge_maps.
CREATE OR REPLACE FUNCTION p2p_sync.move_players(
    p_host uuid, p_incarnation bigint, p_new int8multirange,
    p_followers bigint[], p_predecessor_incarnations bigint[], p_predecessors bigint[],
    p_sequences bigint[], p_paths text[], p_data_types smallint[], p_account_ids bigint[], p_maps text[], p_payloads jsonb[],
    p_not_holder_code integer, p_stale_tenure_code integer, p_not_here_code integer, p_may_wait boolean,
    OUT early bigint[], OUT sequences bigint[], OUT codes integer[], OUT reasons text[], OUT limbo boolean[]
) LANGUAGE plpgsql AS $$
DECLARE
    v_moved record;
    v_verdict smallint;
BEGIN
    early := '{}';
    FOR v_moved IN
        SELECT o.sequence, split_part(o.path, '/', 2)::bigint AS char_id, o.account_id, o.map, o.payload ->> 'event' AS event
            FROM unnest(p_sequences, p_paths, p_data_types, p_account_ids, p_maps, p_payloads) WITH ORDINALITY
                AS o(sequence, path, data_type, account_id, map, payload, place)
            WHERE o.data_type = 12 AND o.path LIKE '@char/%' AND p_new @> o.sequence
            ORDER BY o.place
    LOOP
        IF cardinality(early) > 0 AND EXISTS (
            SELECT FROM unnest(p_followers, p_predecessor_incarnations, p_predecessors) AS f(sequence, incarnation, predecessor)
                WHERE f.sequence = v_moved.sequence AND f.incarnation = p_incarnation AND f.predecessor = ANY (early))
        THEN
            early := early || v_moved.sequence;
        ELSIF v_moved.event = 'leave' THEN
            -- Whether it may is judged with all else.
            PERFORM p2p_sync.leave_player(p_host, p_incarnation, v_moved.sequence, v_moved.char_id);
        ELSE
            v_verdict := p2p_sync.enter_player(p_host, p_incarnation, v_moved.sequence, v_moved.char_id, v_moved.account_id,
                v_moved.map);
            IF v_verdict = 1 AND NOT p_may_wait THEN
                INSERT INTO p2p_sync.player_tenures
                        (char_id, account_id, tenure, host_id, began_incarnation, began_sequence, ended_at)
                    SELECT v_moved.char_id, coalesce(nullif(v_moved.account_id, 0), max(account_id), 0), 0, p_host, p_incarnation,
                            v_moved.sequence, now()
                        FROM p2p_sync.presence WHERE char_id = v_moved.char_id;
                v_verdict := 6;
            END IF;
            IF v_verdict = 1 THEN
                early := early || v_moved.sequence;
            ELSIF v_verdict <> 0 THEN
                sequences := sequences || v_moved.sequence;
                codes := codes || CASE v_verdict WHEN 2 THEN p_stale_tenure_code WHEN 6 THEN p_stale_tenure_code WHEN 3 THEN p_not_holder_code
                    ELSE p_not_here_code END;
                reasons := reasons || CASE v_verdict
                    WHEN 2 THEN format('this host''s lease of %s had passed on before the player''s coming was told: it is kept '
                        'apart until the hub''s operator merges or discards it', v_moved.map)
                    WHEN 3 THEN format('this host does not hold the lease of %s, where character %s would be: ask the hub''s '
                        'operator for it (p2p-sync-proxy maps assign)', v_moved.map, v_moved.char_id)
                    WHEN 5 THEN format('account %s has 32 characters already: have the hub''s operator take away those that are not '
                        'its own (p2p-sync-proxy players account)', v_moved.account_id)
                    WHEN 6 THEN format('another host has character %s, and too much of this host''s waits for it: it is kept apart '
                        'until the hub''s operator merges or discards it; once the character is free, enter it again',
                        v_moved.char_id)
                    ELSE format('character %s is known as another account''s, not %s''s: enter it with its own, or have the hub''s '
                        'operator set that right (p2p-sync-proxy players account)', v_moved.char_id, v_moved.account_id) END;
                limbo := limbo || (v_verdict IN (2, 6));
            END IF;
        END IF;
    END LOOP;
END $$;

-- Finds, for each operation in `p_new` of the players' stream, the tenure it is written at, by its position among those at
-- which its host got and gave up the player; `tenures` has one for each operation, 0 for others. Those that their host has
-- no right to write are told as by judge_maps: what was made under a tenure that has ended is for limbo, unless it was made
-- before the host released the player; what is of a player that never was there is to be refused.
CREATE OR REPLACE FUNCTION p2p_sync.judge_players(
    p_host uuid, p_incarnation bigint, p_new int8multirange, p_player_stream integer,
    p_sequences bigint[], p_stream_of integer[], p_paths text[], p_stale_tenure_code integer, p_not_here_code integer,
    OUT tenures bigint[], OUT sequences bigint[], OUT codes integer[], OUT reasons text[], OUT limbo boolean[]
) LANGUAGE plpgsql AS $$
BEGIN
    WITH judged AS MATERIALIZED (
        SELECT o.sequence, o.place, format('%s %s', o.kind, coalesce(o.char_id, o.account_id)) AS player, t.tenure,
                CASE
                    WHEN t.tenure IS NULL OR t.tenure = 0 THEN false
                    WHEN t.tenure < p2p_sync.player_tenure(o.path)
                        THEN coalesce((p_incarnation, o.sequence) <= (t.ended_incarnation, t.ended_sequence), false)
                    WHEN t.ended_at IS NOT NULL AND t.ended_sequence IS NULL THEN false
                    -- Until another has the player it may save what was left unsaved when that went.
                    ELSE EXISTS (SELECT FROM p2p_sync.presence AS p
                        JOIN p2p_sync.host_assignments AS a ON a.map = p.map
                        WHERE p.char_id = t.char_id AND a.host_id = p_host)
                END AS may_write
            FROM (SELECT sequence, path, place, CASE WHEN path LIKE '@char/%' THEN 'character' ELSE 'account' END AS kind,
                    CASE WHEN path LIKE '@char/%' THEN split_part(path, '/', 2)::bigint END AS char_id,
                    CASE WHEN path LIKE '@account/%' THEN split_part(path, '/', 2)::bigint END AS account_id
                FROM unnest(p_sequences, p_stream_of, p_paths) WITH ORDINALITY AS given(sequence, stream_of, path, place)
                WHERE stream_of = p_player_stream AND p_new @> sequence) AS o
            LEFT JOIN LATERAL (
                (SELECT c.* FROM p2p_sync.player_tenures AS c
                    WHERE c.char_id = o.char_id AND c.host_id = p_host
                        AND (c.began_incarnation, c.began_sequence) <= (p_incarnation, o.sequence)
                    ORDER BY c.began_incarnation DESC, c.began_sequence DESC LIMIT 1)
                UNION ALL
                (SELECT c.* FROM p2p_sync.player_tenures AS c
                    WHERE c.account_id = nullif(o.account_id, 0) AND c.host_id = p_host
                        AND (c.began_incarnation, c.began_sequence) <= (p_incarnation, o.sequence)
                    ORDER BY c.began_incarnation DESC, c.began_sequence DESC LIMIT 1)
            ) AS t ON true
    ), barred AS (
        SELECT *, tenure IS NOT NULL AS was_its FROM judged WHERE NOT may_write ORDER BY sequence, was_its, place
    )
    SELECT (SELECT array_agg(coalesce(j.tenure, 0) ORDER BY o.place)
                FROM unnest(p_sequences) WITH ORDINALITY AS o(sequence, place) LEFT JOIN judged AS j USING (place)),
            array_agg(sequence),
            array_agg(CASE WHEN was_its THEN p_stale_tenure_code ELSE p_not_here_code END),
            array_agg(CASE
                WHEN was_its THEN format('%s was no longer this host''s when this was made or came: it is kept apart until the '
                    'hub''s operator merges or discards it', player)
                ELSE format('%s had not entered a map of this host when this was made: tell of its coming first '
                    '(PLAYER_PRESENCE with the event enter)', player) END),
            array_agg(was_its)
        INTO tenures, sequences, codes, reasons, limbo
        FROM barred;
END $$;

-- Sets apart what may not be written, each operation by the worst that was found against it, which is the first of those to
-- be refused: into limbo or among the rejected operations. A group goes the way of its worst member, whole. `barred` are those of
-- `p_new`, and the rest of the answer is one for each of them.
CREATE OR REPLACE FUNCTION p2p_sync.set_apart(
    p_host uuid, p_incarnation bigint, p_new int8multirange,
    p_found bigint[], p_codes integer[], p_reasons text[], p_limbo boolean[],
    p_streams text[], p_sequences bigint[], p_stream_of integer[], p_operation_ids uuid[], p_tenures bigint[], p_paths text[],
    p_data_types smallint[], p_keeps_every boolean[], p_deleted boolean[], p_account_ids bigint[], p_maps text[],
    p_made_at_ms bigint[], p_payloads jsonb[], p_in_group boolean[],
    OUT barred int8multirange, OUT sequences bigint[], OUT codes integer[], OUT reasons text[], OUT limbo boolean[]
) LANGUAGE plpgsql AS $$
BEGIN
    SELECT coalesce(range_agg(int8range(worst.sequence, worst.sequence, '[]')), '{}'), array_agg(worst.sequence),
            array_agg(worst.code), array_agg(worst.reason), array_agg(worst.limbo)
        INTO barred, sequences, codes, reasons, limbo
        FROM (SELECT DISTINCT ON (f.sequence) f.* FROM unnest(p_found, p_codes, p_reasons, p_limbo) WITH ORDINALITY
                    AS f(sequence, code, reason, limbo, place)
                WHERE p_new @> f.sequence
                ORDER BY f.sequence, f.limbo, f.place) AS worst;

    WITH whole AS (
        SELECT b.sequence, b.code, b.reason, b.limbo, (array_agg(o.operation_id))[1] AS operation_id,
                coalesce(min(o.tenure) FILTER (WHERE NOT p_streams[o.stream_of] LIKE '@%'), 0) AS tenure,
                CASE WHEN bool_or(o.grouped) THEN '' ELSE min(o.path) END AS path,
                CASE WHEN bool_or(o.grouped) THEN -1 ELSE min(o.data_type) END AS data_type,
                coalesce(bool_or(o.grouped), false) OR bool_and(o.keeps_every) AS keeps_every,
                CASE WHEN bool_or(o.grouped) THEN 0 ELSE min(o.account_id) END AS account_id,
                min(o.made_at_ms) AS made_at_ms,
                NOT coalesce(bool_or(o.grouped), false) AND bool_and(o.deleted) AS deleted,
                CASE WHEN bool_or(o.grouped) THEN jsonb_agg(jsonb_build_object('path', o.path, 'type', o.data_type,
                            'keeps_every', o.keeps_every, 'account_id', o.account_id, 'map', o.map,
                            'tenure', CASE WHEN p_streams[o.stream_of] LIKE '@%' THEN 0 ELSE o.tenure END)
                        || CASE WHEN o.deleted THEN '{}' ELSE jsonb_build_object('data', o.payload) END ORDER BY o.place)
                    ELSE (array_agg(o.payload))[1] END AS payload
            FROM unnest(sequences, codes, reasons, limbo) AS b(sequence, code, reason, limbo)
            JOIN unnest(p_sequences, p_stream_of, p_operation_ids, p_tenures, p_paths, p_data_types, p_keeps_every, p_deleted,
                    p_account_ids, p_maps, p_made_at_ms, p_payloads, p_in_group) WITH ORDINALITY
                AS o(sequence, stream_of, operation_id, tenure, path, data_type, keeps_every, deleted, account_id, map,
                    made_at_ms, payload, grouped, place) USING (sequence)
            GROUP BY b.sequence, b.code, b.reason, b.limbo
    ), kept AS (
        INSERT INTO p2p_sync.limbo_operations (host_id, incarnation, sequence, tenure, operation_id, path, data_type,
                keeps_every, account_id, made_at_ms, deleted, payload, code, reason)
            SELECT p_host, p_incarnation, w.sequence, w.tenure, w.operation_id, w.path, w.data_type, w.keeps_every, w.account_id,
                    w.made_at_ms, w.deleted, w.payload, w.code, w.reason
                FROM whole AS w WHERE w.limbo ORDER BY w.sequence
    )
    INSERT INTO p2p_sync.rejected_operations
            (host_id, incarnation, sequence, operation_id, path, data_type, code, reason, payload)
        SELECT p_host, p_incarnation, w.sequence, w.operation_id, w.path, w.data_type, w.code, w.reason,
                convert_to(coalesce(w.payload::text, ''), 'UTF8')
            FROM whole AS w WHERE NOT w.limbo ORDER BY w.sequence;
END $$;

-- Settles, of the operations in `p_new`, those whose writer had not seen the operator's last edit of their path, or one that
-- is not there: by their types' rules (1 host, 2 newest, 3 hub, 4 both), of a group by the strictest of those members'. Each
-- is recorded with both values. A player's coming or going (type 12) is no conflict: it has moved the player by now, and only
-- a merge from limbo edits such a path. `refused` are the sequences that are not to be applied; `sequences` and `edits` tell
-- the edit that each path has, of all members of a group, also where nothing was at the path and so nothing conflicts.
-- Called by apply_batch, which has locked the streams.
CREATE OR REPLACE FUNCTION p2p_sync.settle_conflicts(
    p_host uuid, p_new int8multirange, p_sequences bigint[], p_operation_ids uuid[], p_paths text[], p_data_types smallint[],
    p_keeps_every boolean[], p_deleted boolean[], p_account_ids bigint[], p_maps text[], p_hub_edits_seen bigint[],
    p_payloads jsonb[], p_in_group boolean[], p_rules smallint[],
    OUT refused bigint[], OUT sequences bigint[], OUT edits bigint[]
) LANGUAGE plpgsql AS $$
BEGIN
    WITH compared AS MATERIALIZED (
        SELECT o.*, coalesce(o.grouped, false) AS in_group, coalesce(s.hub_edit, 0) AS edit,
                coalesce(s.hub_edit, 0) <> o.seen AS differs,
                o.data_type <> 12 AND coalesce(s.hub_edit <> o.seen, false) AS conflicts,
                CASE WHEN s.path IS NOT NULL THEN jsonb_build_object('edit', s.hub_edit, 'vector', s.version_vector,
                        'stream_sequence', s.stream_sequence, 'account_id', s.account_id, 'map', s.map)
                    || CASE WHEN s.deleted THEN '{}' ELSE jsonb_build_object('data', s.payload) END END AS hub_side
            FROM unnest(p_sequences, p_operation_ids, p_paths, p_data_types, p_keeps_every, p_deleted, p_account_ids, p_maps,
                    p_hub_edits_seen, p_payloads, p_in_group, p_rules) WITH ORDINALITY
                AS o(sequence, operation_id, path, data_type, keeps_every, deleted, account_id, map, seen, payload, grouped,
                    rule, place)
            LEFT JOIN p2p_sync.states AS s ON s.path = o.path
            WHERE p_new @> o.sequence
    ), judged AS MATERIALIZED (
        SELECT sequence, bool_or(in_group) AS in_group, max(rule) FILTER (WHERE conflicts) AS rule,
                (array_agg(path ORDER BY place) FILTER (WHERE conflicts))[1] AS path,
                (array_agg(edit ORDER BY place) FILTER (WHERE conflicts))[1] AS edit
            FROM compared GROUP BY sequence HAVING bool_or(differs)
    ), recorded AS (
        INSERT INTO p2p_sync.conflicts AS c (host_id, path, hub_edit, operation_id, in_group, rule, operations, members)
            SELECT p_host, j.path, j.edit, (array_agg(m.operation_id))[1], j.in_group,
                    (ARRAY['host', 'newest', 'hub', 'both'])[j.rule], j.operations,
                    jsonb_agg(jsonb_build_object('path', m.path, 'type', m.data_type, 'keeps_every', m.keeps_every,
                        'conflicts', m.conflicts, 'hub', m.hub_side,
                        'host', jsonb_build_object('account_id', m.account_id, 'map', m.map)
                            || CASE WHEN m.deleted THEN '{}' ELSE jsonb_build_object('data', m.payload) END) ORDER BY m.place)
                FROM (SELECT DISTINCT ON (path, edit) *, count(*) OVER (PARTITION BY path, edit) AS operations
                    FROM judged WHERE rule IS NOT NULL ORDER BY path, edit, sequence DESC) AS j
                JOIN compared AS m USING (sequence)
                GROUP BY sequence, j.path, j.edit, j.in_group, j.rule, j.operations
                ORDER BY j.path
            ON CONFLICT (host_id, path, hub_edit) DO UPDATE SET
                operations = c.operations + excluded.operations, last_at = now(),
                operation_id = CASE WHEN c.in_group OR excluded.in_group THEN c.operation_id ELSE excluded.operation_id END,
                members = CASE WHEN c.in_group OR excluded.in_group THEN c.members
                    ELSE jsonb_set(c.members, '{0,host}', excluded.members #> '{0,host}') END
    )
    SELECT coalesce((SELECT array_agg(sequence) FROM judged WHERE rule >= 3), '{}'),
            array_agg(sequence ORDER BY place), array_agg(c.edit ORDER BY place)
        INTO refused, sequences, edits
        FROM compared AS c JOIN judged USING (sequence);
END $$;

-- Writes what the operator decides for a conflict as an edit, in the order of its streams: what the hub had before it, what
-- the host wrote, or something else (`p_payload`, not of a group). False where there is no such conflict.
CREATE OR REPLACE FUNCTION p2p_sync.resolve_conflict(
    p_conflict_id bigint, p_take text, p_payload jsonb, p_operation_id uuid
) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    v_conflict p2p_sync.conflicts;
    v_stream text;
    v_member record;
BEGIN
    -- The streams go before the conflict's row, as where it is recorded.
    PERFORM FROM p2p_sync.hub FOR UPDATE;
    FOR v_stream IN SELECT DISTINCT p2p_sync.stream_of(e ->> 'path') AS stream
        FROM p2p_sync.conflicts, jsonb_array_elements(members) AS e WHERE conflict_id = p_conflict_id ORDER BY stream
    LOOP
        PERFORM p2p_sync.lock_stream(v_stream);
    END LOOP;
    UPDATE p2p_sync.conflicts SET resolved_at = now(), resolution = p_take
        WHERE conflict_id = p_conflict_id RETURNING * INTO v_conflict;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    FOR v_member IN
        SELECT e ->> 'path' AS path, (e ->> 'type')::smallint AS data_type, (e ->> 'keeps_every')::boolean AS keeps_every,
                CASE p_take WHEN 'data' THEN p_payload ELSE e #> ARRAY[p_take, 'data'] END AS payload,
                CASE WHEN p_take <> 'data' THEN (e #>> ARRAY[p_take, 'account_id'])::bigint END AS account_id,
                CASE WHEN p_take <> 'data' THEN e #>> ARRAY[p_take, 'map'] END AS map
            FROM jsonb_array_elements(v_conflict.members) AS e
            ORDER BY p2p_sync.stream_of(e ->> 'path'), (e ->> 'path') COLLATE "C"
    LOOP
        PERFORM p2p_sync.write_edit(v_member.path, v_member.data_type, v_member.keeps_every, v_member.payload,
            v_member.account_id, v_member.map, p_operation_id, v_conflict.in_group,
            floor(extract(epoch FROM now()) * 1000)::bigint);
    END LOOP;
    RETURN true;
END $$;

-- Has operations embedded that were just written, each newest of its path or of a type kept as every; what is deleted leaves
-- queue and vectors now. Called in the writing transaction, which has locked the streams. The queue's row of a path is locked
-- before its vector is touched, here and everywhere.
CREATE OR REPLACE FUNCTION p2p_sync.enqueue_embeddings(
    p_paths text[], p_streams text[], p_numbers bigint[], p_keeps_every boolean[], p_deleted boolean[], p_maps text[]
) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF true = ANY (p_deleted) THEN
        PERFORM FROM p2p_sync.embedding_queue
            WHERE path IN (SELECT o.path FROM unnest(p_paths, p_deleted) AS o(path, deleted) WHERE o.deleted)
            ORDER BY path, entry FOR UPDATE;
        DELETE FROM p2p_sync.embedding_queue AS q
            USING unnest(p_paths, p_numbers, p_deleted) AS o(path, number, deleted)
            WHERE o.deleted AND q.path = o.path AND q.stream_sequence < o.number;
        DELETE FROM p2p_sync.embeddings AS e
            USING unnest(p_paths, p_numbers, p_deleted) AS o(path, number, deleted)
            WHERE o.deleted AND e.path = o.path AND e.stream_sequence < o.number;
    END IF;
    INSERT INTO p2p_sync.embedding_queue AS q (path, entry, stream, stream_sequence, first_sequence, map)
        SELECT o.path, CASE WHEN o.keeps_every THEN o.number ELSE 0 END, o.stream, o.number, o.number, o.map
            FROM unnest(p_paths, p_streams, p_numbers, p_keeps_every, p_deleted, p_maps)
                AS o(path, stream, number, keeps_every, deleted, map)
            WHERE NOT o.deleted AND NOT EXISTS (
                SELECT FROM unnest(p_paths, p_numbers, p_deleted) AS d(path, number, deleted)
                    WHERE d.deleted AND d.path = o.path AND d.number > o.number)
            ORDER BY o.path COLLATE "C", 2
        ON CONFLICT (path, entry) DO UPDATE SET
            stream_sequence = excluded.stream_sequence, map = excluded.map, attempts = 0, due_at = now(),
            dead_code = NULL, reason = NULL
            WHERE q.stream_sequence < excluded.stream_sequence;
END $$;

-- As after a write by a host, for a path that the operator edited.
CREATE OR REPLACE FUNCTION p2p_sync.enqueue_embedding_of(p_path text) RETURNS void LANGUAGE sql AS $$
    SELECT p2p_sync.enqueue_embeddings(ARRAY[path], ARRAY[stream], ARRAY[stream_sequence], ARRAY[keeps_every], ARRAY[deleted],
            ARRAY[map])
        FROM p2p_sync.states WHERE path = p_path;
$$;

-- Takes what is due for so long, of some maps (NULL: of all), with what it is of; `data_type` is NULL where that is gone.
CREATE OR REPLACE FUNCTION p2p_sync.claim_embeddings(p_maps text[], p_limit integer, p_lease interval)
RETURNS TABLE (path text, entry bigint, claimed bigint, attempts integer, stream_sequence bigint, data_type smallint, map text,
    account_id bigint, received_at timestamptz, payload text)
LANGUAGE sql AS $$
    WITH due AS (
        SELECT q.path, q.entry FROM p2p_sync.embedding_queue AS q
            WHERE q.dead_code IS NULL AND q.due_at <= clock_timestamp() AND (p_maps IS NULL OR q.map = ANY (p_maps))
            ORDER BY q.due_at LIMIT p_limit FOR UPDATE SKIP LOCKED
    ), taken AS (
        UPDATE p2p_sync.embedding_queue AS q SET due_at = clock_timestamp() + p_lease
            FROM due WHERE q.path = due.path AND q.entry = due.entry
            RETURNING q.path, q.entry, q.stream, q.stream_sequence, q.attempts
    )
    SELECT t.path, t.entry, t.stream_sequence, t.attempts, o.stream_sequence, o.data_type, o.map, o.account_id, o.received_at,
            o.payload::text
        FROM taken AS t
        LEFT JOIN LATERAL (
            SELECT s.stream_sequence, s.data_type, s.map, s.account_id, s.received_at, s.payload
                FROM p2p_sync.states AS s WHERE t.entry = 0 AND s.path = t.path AND NOT s.deleted
            UNION ALL
            SELECT l.stream_sequence, l.data_type, l.map, l.account_id, l.received_at, l.payload
                FROM p2p_sync.operations AS l
                WHERE t.entry > 0 AND l.stream = t.stream AND l.stream_sequence = t.entry AND l.keeps_every
                    AND l.path = t.path AND NOT l.deleted
            LIMIT 1
        ) AS o ON true;
$$;

-- Writes what was taken and embedded, where the path was not deleted since, and takes it out of the queue, where nothing newer
-- came. `p_vector_of` says which of `p_vectors`, from 1; 0 where there is no text, so that what the path had goes. Gives how
-- many were done; NULL, and nothing is written, where the vectors are another model's than the schema's.
CREATE OR REPLACE FUNCTION p2p_sync.store_embeddings(
    p_model text, p_dimensions integer, p_paths text[], p_entries bigint[], p_claimed bigint[], p_sequences bigint[],
    p_data_types smallint[], p_maps text[], p_account_ids bigint[], p_received_at timestamptz[], p_contents text[],
    p_content_hashes bytea[], p_metadata jsonb[], p_vector_of integer[], p_vectors real[]
) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    v_done bigint;
BEGIN
    PERFORM FROM p2p_sync.embedding_space WHERE model = p_model FOR SHARE;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    WITH held AS MATERIALIZED (
        SELECT q.path, q.entry, g.place, q.stream_sequence = g.claimed AS is_last
            FROM unnest(p_paths, p_entries, p_claimed) WITH ORDINALITY AS g(path, entry, claimed, place)
            JOIN p2p_sync.embedding_queue AS q ON q.path = g.path AND q.entry = g.entry
            WHERE q.first_sequence <= g.claimed
            FOR UPDATE OF q SKIP LOCKED
    ), done AS (
        DELETE FROM p2p_sync.embedding_queue AS q USING held AS h WHERE q.path = h.path AND q.entry = h.entry AND h.is_last
    ), waiting AS (
        UPDATE p2p_sync.embedding_queue AS q SET due_at = now()
            FROM held AS h WHERE q.path = h.path AND q.entry = h.entry AND NOT h.is_last
    ), emptied AS (
        DELETE FROM p2p_sync.embeddings AS e USING held AS h
            WHERE e.path = h.path AND e.entry = h.entry AND p_vector_of[h.place] = 0
    ), stored AS (
        INSERT INTO p2p_sync.embeddings AS e (path, entry, stream_sequence, data_type, map, account_id, received_at, content,
                content_hash, metadata, embedding)
            SELECT h.path, h.entry, p_sequences[h.place], p_data_types[h.place], p_maps[h.place], p_account_ids[h.place],
                    p_received_at[h.place], p_contents[h.place], p_content_hashes[h.place], p_metadata[h.place],
                    p_vectors[(p_vector_of[h.place] - 1) * p_dimensions + 1 : p_vector_of[h.place] * p_dimensions]::halfvec
                FROM held AS h WHERE p_vector_of[h.place] > 0
            ON CONFLICT (path, entry) DO UPDATE SET
                stream_sequence = excluded.stream_sequence, data_type = excluded.data_type, map = excluded.map,
                account_id = excluded.account_id, received_at = excluded.received_at, content = excluded.content,
                content_hash = excluded.content_hash, metadata = excluded.metadata, embedding = excluded.embedding,
                embedded_at = now()
                WHERE e.stream_sequence <= excluded.stream_sequence
    )
    SELECT count(*) INTO v_done FROM held;
    RETURN v_done;
END $$;

-- Writes what a tool keeps under an id of its own, in the place of what it had there. `verdict`: 0 it took something's place,
-- 1 it is new; 2 the schema's vectors are another model's, 3 they are being made anew: nothing is written.
CREATE OR REPLACE FUNCTION p2p_sync.put_entry(
    p_model text, p_path text, p_data_type smallint, p_map text, p_content text, p_content_hash bytea, p_metadata jsonb,
    p_vector real[], OUT verdict smallint
) LANGUAGE plpgsql AS $$
DECLARE
    v_space p2p_sync.embedding_space;
BEGIN
    SELECT * INTO v_space FROM p2p_sync.embedding_space FOR SHARE;
    IF v_space.model IS DISTINCT FROM p_model THEN
        verdict := 2;
        RETURN;
    END IF;
    -- What came after its last look would be lost with the table that is replaced: nothing else holds this text.
    IF v_space.next_model IS NOT NULL THEN
        verdict := 3;
        RETURN;
    END IF;
    INSERT INTO p2p_sync.embeddings (path, entry, stream_sequence, data_type, map, account_id, received_at, content, content_hash,
            metadata, embedding)
        VALUES (p_path, 0, 0, p_data_type, p_map, 0, now(), p_content, p_content_hash, p_metadata, p_vector::halfvec)
        ON CONFLICT (path, entry) DO UPDATE SET
            map = excluded.map, received_at = excluded.received_at, content = excluded.content,
            content_hash = excluded.content_hash, metadata = excluded.metadata, embedding = excluded.embedding,
            embedded_at = now()
        RETURNING CASE WHEN xmax = 0 THEN 1 ELSE 0 END INTO verdict;
END $$;

-- Gives back what was taken and not embedded, to be tried again after so long; what has a code is dead until it is retried.
-- What changed meanwhile is due already.
CREATE OR REPLACE FUNCTION p2p_sync.release_embeddings(
    p_paths text[], p_entries bigint[], p_claimed bigint[], p_delays_ms bigint[], p_attempts integer[], p_codes integer[],
    p_reasons text[]
) RETURNS void LANGUAGE sql AS $$
    WITH held AS MATERIALIZED (
        SELECT q.path, q.entry, g.delay_ms, g.attempts, g.code, g.reason
            FROM unnest(p_paths, p_entries, p_claimed, p_delays_ms, p_attempts, p_codes, p_reasons)
                AS g(path, entry, claimed, delay_ms, attempts, code, reason)
            JOIN p2p_sync.embedding_queue AS q ON q.path = g.path AND q.entry = g.entry
            WHERE q.stream_sequence = g.claimed
            FOR UPDATE OF q SKIP LOCKED
    )
    UPDATE p2p_sync.embedding_queue AS q
        SET due_at = clock_timestamp() + make_interval(secs => h.delay_ms / 1000.0), attempts = h.attempts, dead_code = h.code,
            reason = coalesce(h.reason, q.reason)
        FROM held AS h WHERE q.path = h.path AND q.entry = h.entry;
$$;

-- Spends tokens of a day's budget, `p_limit` (NULL: without a bound). Of a host's message (`p_sequence`) the position is noted,
-- and one that was is a replay. `verdict`: 0 spent, 1 replay, 2 more than is left, which is told. What is negative gives back.
CREATE OR REPLACE FUNCTION p2p_sync.spend_embedding_tokens(
    p_spender uuid, p_tokens bigint, p_limit bigint, p_incarnation bigint, p_sequence bigint,
    OUT verdict smallint, OUT tokens_left bigint
) LANGUAGE plpgsql AS $$
DECLARE
    v_today date := (now() AT TIME ZONE 'UTC')::date;
    v_found p2p_sync.embedding_spend;
BEGIN
    INSERT INTO p2p_sync.embedding_spend (spender, day, tokens) VALUES (p_spender, v_today, 0) ON CONFLICT DO NOTHING;
    SELECT * INTO v_found FROM p2p_sync.embedding_spend WHERE spender = p_spender FOR UPDATE;
    IF v_found.day <> v_today THEN
        v_found.day := v_today;
        v_found.tokens := 0;
    END IF;
    IF p_sequence IS NOT NULL THEN
        IF p_incarnation < v_found.incarnation OR p_incarnation = v_found.incarnation AND (
            p_sequence = ANY (v_found.sequences)
            OR cardinality(v_found.sequences) = 64 AND p_sequence < v_found.sequences[1])
        THEN
            verdict := 1;
            RETURN;
        END IF;
        SELECT array_agg(s ORDER BY s) INTO v_found.sequences
            FROM (SELECT s FROM unnest(CASE WHEN p_incarnation = v_found.incarnation THEN v_found.sequences END || p_sequence) AS s
                ORDER BY s DESC LIMIT 64) AS newest;
        v_found.incarnation := p_incarnation;
    END IF;
    verdict := CASE WHEN v_found.tokens + p_tokens > p_limit THEN 2 ELSE 0 END;
    IF verdict = 0 THEN
        v_found.tokens := greatest(v_found.tokens + p_tokens, 0);
    END IF;
    tokens_left := greatest(p_limit - v_found.tokens, 0);
    UPDATE p2p_sync.embedding_spend SET day = v_found.day, tokens = v_found.tokens, incarnation = v_found.incarnation,
            sequences = v_found.sequences
        WHERE spender = p_spender;
END $$;

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
--   p_followers, p_predecessor_incarnations, p_predecessors   what has to be settled before an operation, also before one that
--                                is to be refused, by its sequence, in the order of those; one may be there several times
--   p_leases_required            only a map's holder writes it, and only who has a player writes that; otherwise everybody
--                                does, and at the last tenure
--   p_conflict_rules             per operation: the rule of settle_conflicts
--   p_embedded                   which operations are to be embedded, or cease to be, from 1; empty where none is
--
-- In order: lock the incarnation's row; find what is new; hold back what has to wait for a predecessor; settle; keep what
-- is refused; hold back players whom another host keeps; and last, for then other hosts' messages about the same maps have to
-- wait: lock the streams, take their numbers, move players, set apart what their host may not write, compare with the states
-- and write them and the log.
--
-- The result: `closed` (nothing was done), `waiting` (not settled, to be sent again), `refused_before` (was to be refused,
-- but an earlier call had settled it), `told_*` (what this call or an earlier one rejected, or put into limbo, with the
-- reason given then; where this call did, from behind the first `told_before` on) and
-- `decided_*` (0 applied, 1 superseded, 2 conflict with an edit by the hub), by place in the arrays. An operation in none of them was applied by
-- an earlier call. `edit_*` tell the edit that a path has, of each operation whose writer had seen another, applied or not;
-- of a group as many as it has members, in their order.
CREATE OR REPLACE FUNCTION p2p_sync.apply_batch(
    p_host uuid, p_incarnation bigint, p_gaps_max integer,
    p_batch int8multirange, p_refused int8multirange, p_withdrawn int8multirange,
    p_streams text[], p_stream_counts bigint[],
    p_sequences bigint[], p_stream_of integer[], p_stream_back bigint[],
    p_followers bigint[], p_predecessor_incarnations bigint[], p_predecessors bigint[],
    p_operation_ids uuid[], p_tenures bigint[], p_paths text[], p_data_types smallint[], p_keeps_every boolean[],
    p_log_seconds integer[], p_deleted boolean[], p_account_ids bigint[], p_maps text[], p_hub_edits_seen bigint[],
    p_made_at_ms bigint[], p_payloads jsonb[], p_in_group boolean[],
    p_refused_sequences bigint[], p_refused_ids uuid[], p_refused_paths text[], p_refused_types integer[],
    p_refused_codes integer[], p_refused_reasons text[], p_refused_payloads bytea[],
    p_conflict_code integer, p_conflict_reason text,
    p_leases_required boolean, p_not_holder_code integer, p_stale_tenure_code integer, p_not_here_code integer,
    p_conflict_rules smallint[], p_embedded bigint[],
    OUT timeline bigint, OUT received_at_ms bigint, OUT closed boolean, OUT waiting bigint[], OUT refused_before bigint[],
    OUT told_sequences bigint[], OUT told_codes integer[], OUT told_reasons text[], OUT told_limbo boolean[],
    OUT told_before integer, OUT decided_rows bigint[], OUT decided_outcomes smallint[], OUT decided_numbers bigint[],
    OUT decided_tenures bigint[], OUT edit_sequences bigint[], OUT edits bigint[]
) LANGUAGE plpgsql AS $$
DECLARE
    v_hub uuid;
    v_settled int8multirange;
    v_after int8multirange;
    v_new int8multirange;
    v_refused int8multirange;
    v_operation record;
    v_heads bigint[];
    v_conflicting bigint[] := '{}';
    v_settled_conflicts record;
    v_tenures bigint[];
    v_player_stream integer;
    v_may_wait boolean;
    v_early bigint[];
    v_held record;
    v_past int8multirange := '{}';
    v_player_tenures bigint[] := '{}';
    v_found record;
    v_found_sequences bigint[] := '{}';
    v_found_codes integer[];
    v_found_reasons text[];
    v_found_limbo boolean[];
    v_barred record;
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
        v_refused := p_refused;
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
        v_refused := p_refused - v_settled;

        -- An operation waits until its predecessor is settled, or is before it in this call. They come in the order of their
        -- sequences, so each predecessor is decided when its successor's turn comes. What is to be refused waits too: else what
        -- follows it would overtake what is before it.
        IF cardinality(p_predecessors) > 0 AND NOT isempty(v_new + v_refused) THEN
            v_after := v_settled + p_batch + p_refused + p_withdrawn;
            FOR v_operation IN
                SELECT f.sequence, f.predecessor_incarnation, f.predecessor
                    FROM unnest(p_followers, p_predecessor_incarnations, p_predecessors) WITH ORDINALITY
                        AS f(sequence, predecessor_incarnation, predecessor, ord)
                    WHERE v_new @> f.sequence OR v_refused @> f.sequence
                    ORDER BY f.ord
            LOOP
                IF v_operation.predecessor_incarnation < p_incarnation THEN
                    CONTINUE WHEN p2p_sync.is_settled(p_host, v_operation.predecessor_incarnation, v_operation.predecessor);
                ELSE
                    CONTINUE WHEN v_after @> v_operation.predecessor;
                END IF;
                -- It waits already, for another that it follows.
                CONTINUE WHEN NOT v_after @> v_operation.sequence;
                v_after := v_after - int8multirange(int8range(v_operation.sequence, v_operation.sequence, '[]'));
                waiting := waiting || v_operation.sequence;
            END LOOP;
            v_new := v_new * v_after;
            v_refused := v_refused * v_after;
        END IF;

        v_after := v_settled + v_new + v_refused + (p_withdrawn - p_batch - p_refused);
        IF v_after <> v_settled THEN
            UPDATE p2p_sync.settled_sequences SET settled = v_after WHERE host_id = p_host AND incarnation = p_incarnation;
        END IF;

        IF v_settled && (p_batch + p_refused) THEN
            -- One by one: between two of them there may lie all that the host was ever refused.
            SELECT array_agg(r.sequence), array_agg(r.code), array_agg(r.reason), array_agg(r.limbo)
                INTO told_sequences, told_codes, told_reasons, told_limbo
                FROM (SELECT DISTINCT a.sequence FROM unnest(p_sequences || p_refused_sequences) AS a(sequence)
                    WHERE v_settled @> a.sequence) AS asked
                CROSS JOIN LATERAL (
                    SELECT sequence, code, reason, false AS limbo FROM p2p_sync.rejected_operations
                        WHERE host_id = p_host AND incarnation = p_incarnation AND sequence = asked.sequence
                    UNION ALL SELECT sequence, code, reason, true FROM p2p_sync.limbo_operations
                        WHERE host_id = p_host AND incarnation = p_incarnation AND sequence = asked.sequence
                    LIMIT 1) AS r;
            SELECT array_agg(r.sequence) INTO refused_before
                FROM unnest(p_refused_sequences) AS r(sequence) WHERE v_settled @> r.sequence;
            IF p_conflict_code = ANY (told_codes) THEN
                -- Who asks again was not told, or has forgotten.
                SELECT array_agg(o.sequence ORDER BY o.place), array_agg(coalesce(s.hub_edit, 0) ORDER BY o.place)
                    INTO edit_sequences, edits
                    FROM unnest(p_sequences, p_paths) WITH ORDINALITY AS o(sequence, path, place)
                    JOIN unnest(told_sequences, told_codes) AS t(sequence, code) USING (sequence)
                    LEFT JOIN p2p_sync.states AS s ON s.path = o.path
                    WHERE t.code = p_conflict_code;
            END IF;
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
                WHERE v_refused @> r.sequence;
    END IF;

    IF isempty(v_new) THEN
        RETURN;
    END IF;

    IF p_leases_required AND 12 = ANY (p_data_types) THEN
        -- What waits keeps gaps open, and too many of them would stop all that the host sends: then it waits in limbo.
        v_may_wait := (SELECT count(*) FROM unnest(v_after)) <= p_gaps_max / 2;
        IF v_may_wait THEN
            v_early := p2p_sync.find_early(p_host, v_new, p_sequences, p_paths, p_data_types, p_account_ids, p_maps, p_payloads);
            IF cardinality(v_early) > 0 THEN
                SELECT * INTO v_held FROM p2p_sync.hold_back(p_host, p_incarnation, v_new + v_refused, v_early, p_followers,
                    p_predecessor_incarnations, p_predecessors);
                waiting := waiting || v_held.held;
                v_new := v_new * v_held.remaining;
                v_refused := v_refused * v_held.remaining;
                IF isempty(v_new) THEN
                    RETURN;
                END IF;
            END IF;
        END IF;
    END IF;

    -- A tenure that has passed, or is another's, never comes to be this host's, whatever happens now: what was made under it is
    -- not written, and who once held a map has no business with the lock for which its holder waits.
    IF p_leases_required AND EXISTS (
        SELECT FROM unnest(p_streams) AS s(stream)
            LEFT JOIN LATERAL (SELECT host_id, tenure FROM p2p_sync.host_assignments WHERE map = s.stream LIMIT 1) AS a ON true
            WHERE NOT s.stream LIKE '@%' AND (a.host_id IS DISTINCT FROM p_host OR a.tenure > ANY (p_tenures)))
    THEN
        v_past := (SELECT coalesce(range_agg(int8range(o.sequence, o.sequence, '[]')), '{}')
            FROM unnest(p_sequences, p_tenures, p_stream_of) AS o(sequence, tenure, stream_of)
            LEFT JOIN p2p_sync.host_assignments AS a ON a.map = p_streams[o.stream_of]
            WHERE v_new @> o.sequence AND NOT p_streams[o.stream_of] LIKE '@%'
                AND o.tenure <= coalesce(a.tenure, 0) AND (o.tenure, p_host) IS DISTINCT FROM (a.tenure, a.host_id));
    END IF;

    -- Streams to which nothing is written are not locked: their count is 0, and they get no head. But players' are, where it is
    -- to be said who they are.
    IF v_new <> p_batch OR NOT isempty(v_past) THEN
        SELECT array_agg(CASE WHEN s.place = ANY (written.streams) THEN s.count ELSE 0 END ORDER BY s.place) INTO p_stream_counts
            FROM unnest(p_stream_counts) WITH ORDINALITY AS s(count, place),
                (SELECT array_agg(DISTINCT o.stream_of) AS streams FROM unnest(p_sequences, p_stream_of) AS o(sequence, stream_of)
                    WHERE v_new @> o.sequence AND (NOT v_past @> o.sequence OR p_streams[o.stream_of] = '@player')) AS written;
    END IF;

    -- Each row is locked as it is reached, and they come sorted: messages about the same maps wait, but never in a circle.
    -- Numbers for operations that turn out to need none are left unused.
    WITH allocated AS (
        INSERT INTO p2p_sync.map_states AS m (stream, head, home_hub)
            SELECT a.stream, a.count, v_hub FROM unnest(p_streams, p_stream_counts) AS a(stream, count) WHERE a.count > 0
            ON CONFLICT (stream) DO UPDATE SET head = m.head + excluded.head
            RETURNING m.stream, m.head
    )
    SELECT array_agg(a.head ORDER BY s.place) INTO v_heads
        FROM unnest(p_streams) WITH ORDINALITY AS s(stream, place) LEFT JOIN allocated AS a USING (stream);

    -- The right to write. Whoever changes an assignment has to lock its stream first, so that what is read here holds until
    -- the commit; of streams that are not locked it is another tenure than that of any operation, then as now. NULL for streams that no lease governs: of players, which have tenures of their own, and of hosts.
    SELECT array_agg(CASE WHEN s.stream LIKE '@%' THEN NULL
                WHEN NOT p_leases_required THEN coalesce(a.tenure, 0)
                WHEN a.host_id = p_host THEN a.tenure
                ELSE -1 END ORDER BY s.place)
        INTO v_tenures
        FROM unnest(p_streams) WITH ORDINALITY AS s(stream, place)
        LEFT JOIN LATERAL (SELECT host_id, tenure FROM p2p_sync.host_assignments WHERE map = s.stream LIMIT 1) AS a ON true;
    IF p_leases_required AND EXISTS (
        SELECT FROM unnest(p_sequences, p_tenures, p_stream_of) AS o(sequence, tenure, stream_of)
            WHERE o.tenure <> v_tenures[o.stream_of] AND v_new @> o.sequence)
    THEN
        SELECT * INTO v_found FROM p2p_sync.judge_maps(p_host, v_new, v_tenures, p_streams, p_sequences, p_stream_of, p_tenures,
            p_not_holder_code, p_stale_tenure_code);
        v_found_sequences := v_found.sequences;
        v_found_codes := v_found.codes;
        v_found_reasons := v_found.reasons;
        v_found_limbo := v_found.limbo;
    END IF;

    -- Who comes and goes is moved first, so that all else can be judged by its position, at once. The players' stream is
    -- locked: nobody else moves one meanwhile.
    v_player_stream := array_position(p_streams, '@player');
    IF p_stream_counts[v_player_stream] = 0 THEN
        v_player_stream := NULL;
    END IF;
    IF v_player_stream IS NOT NULL AND NOT p_leases_required THEN
        IF EXISTS (SELECT FROM p2p_sync.presence) THEN
            SELECT array_agg(coalesce(p2p_sync.player_tenure(o.path), 0) ORDER BY o.place) INTO v_player_tenures
                FROM unnest(p_paths) WITH ORDINALITY AS o(path, place);
        END IF;
    ELSIF v_player_stream IS NOT NULL THEN
        SELECT * INTO v_found FROM p2p_sync.move_players(p_host, p_incarnation, v_new, p_followers, p_predecessor_incarnations,
            p_predecessors, p_sequences, p_paths, p_data_types, p_account_ids, p_maps, p_payloads, p_not_holder_code,
            p_stale_tenure_code, p_not_here_code, v_may_wait);
        IF cardinality(v_found.early) > 0 THEN
            -- Another host got the player since it was looked for.
            SELECT * INTO v_held FROM p2p_sync.hold_back(p_host, p_incarnation, v_new + v_refused, v_found.early, p_followers,
                p_predecessor_incarnations, p_predecessors);
            waiting := waiting || v_held.held;
            v_new := v_new * v_held.remaining;
            IF isempty(v_new) THEN
                PERFORM p2p_sync.give_back(p_streams, p_stream_counts, p_stream_of, p_sequences, v_new);
                RETURN;
            END IF;
        END IF;
        v_found_sequences := v_found_sequences || v_found.sequences;
        v_found_codes := v_found_codes || v_found.codes;
        v_found_reasons := v_found_reasons || v_found.reasons;
        v_found_limbo := v_found_limbo || v_found.limbo;
        SELECT * INTO v_found FROM p2p_sync.judge_players(p_host, p_incarnation, v_new, v_player_stream, p_sequences,
            p_stream_of, p_paths, p_stale_tenure_code, p_not_here_code);
        v_player_tenures := v_found.tenures;
        v_found_sequences := v_found_sequences || v_found.sequences;
        v_found_codes := v_found_codes || v_found.codes;
        v_found_reasons := v_found_reasons || v_found.reasons;
        v_found_limbo := v_found_limbo || v_found.limbo;
    END IF;

    IF cardinality(v_found_sequences) > 0 THEN
        SELECT * INTO v_barred FROM p2p_sync.set_apart(p_host, p_incarnation, v_new, v_found_sequences, v_found_codes,
            v_found_reasons, v_found_limbo, p_streams, p_sequences, p_stream_of, p_operation_ids, p_tenures, p_paths,
            p_data_types, p_keeps_every, p_deleted, p_account_ids, p_maps, p_made_at_ms, p_payloads, p_in_group);
        told_before := coalesce(cardinality(told_sequences), 0);
        told_sequences := told_sequences || v_barred.sequences;
        told_codes := told_codes || v_barred.codes;
        told_reasons := told_reasons || v_barred.reasons;
        told_limbo := told_limbo || v_barred.limbo;
        v_new := v_new - v_barred.barred;
        PERFORM p2p_sync.give_back(p_streams, p_stream_counts, p_stream_of, p_sequences, v_new);
        IF isempty(v_new) THEN
            RETURN;
        END IF;
    END IF;

    -- An edit that was seen but is not there is as wrong as one that is there but was not seen.
    IF EXISTS (SELECT FROM unnest(p_paths, p_hub_edits_seen) AS o(path, seen)
        LEFT JOIN LATERAL (SELECT hub_edit FROM p2p_sync.states WHERE states.path = o.path AND hub_edit > 0 LIMIT 1) AS s ON true
        WHERE coalesce(s.hub_edit, 0) <> o.seen)
    THEN
        SELECT * INTO v_settled_conflicts FROM p2p_sync.settle_conflicts(p_host, v_new, p_sequences, p_operation_ids, p_paths,
            p_data_types, p_keeps_every, p_deleted, p_account_ids, p_maps, p_hub_edits_seen, p_payloads, p_in_group,
            p_conflict_rules);
        v_conflicting := v_settled_conflicts.refused;
        edit_sequences := edit_sequences || v_settled_conflicts.sequences;
        edits := edits || v_settled_conflicts.edits;
    END IF;

    -- With the streams locked, what this statement reads of their states is what it writes over.
    -- Incarnations are counted by each host's own outbox and order the operations of that host alone. A lease gives each
    -- writer of a map a tenure of its own; where none governs, hosts that write one path share a tenure, and among them the
    -- one that comes last wins.
    WITH decided AS MATERIALIZED (
        SELECT *, newer AND NOT conflicts AND row_number() OVER (
                PARTITION BY path ORDER BY newer AND NOT conflicts DESC, tenure DESC, sequence DESC) = 1 AS is_newest
            FROM (
                SELECT o.*, coalesce(o.grouped, false) AS in_group, v_heads[o.stream_of] - o.stream_back AS number,
                        o.sequence = ANY (v_conflicting) AS conflicts, coalesce(s.hub_edit, 0) AS hub_edit,
                        coalesce(o.tenure > s.tenure OR o.tenure = s.tenure AND (
                            s.host_id <> p_host OR (p_incarnation, o.sequence) > (s.incarnation, s.sequence)), true) AS newer,
                        o.log_seconds = 0
                            OR coalesce(s.logged_at, '-infinity') <= now() - make_interval(secs => o.log_seconds) AS log_is_due
                    FROM (SELECT given.*, CASE WHEN v_tenures[stream_of] IS NULL THEN coalesce(v_player_tenures[place], 0)
                            ELSE greatest(made_under, v_tenures[stream_of]) END AS tenure
                        FROM unnest(p_sequences, p_stream_of, p_stream_back, p_operation_ids, p_tenures, p_paths, p_data_types,
                            p_keeps_every, p_log_seconds, p_deleted, p_account_ids, p_maps, p_hub_edits_seen, p_made_at_ms,
                            p_payloads, p_in_group)
                        WITH ORDINALITY AS given(sequence, stream_of, stream_back, operation_id, made_under, path, data_type,
                            keeps_every, log_seconds, deleted, account_id, map, hub_edit_seen, made_at_ms, payload, grouped,
                            place)) AS o
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
                keeps_every, tenure, incarnation, sequence, host_id, account_id, map, deleted, payload, made_at_ms, superseded,
                origin_hub, hub_edit)
            SELECT p_streams[stream_of], number, now(), operation_id, in_group, path, data_type, keeps_every,
                    tenure, p_incarnation, sequence, p_host, account_id, map, deleted, payload, made_at_ms,
                    NOT (is_newest OR keeps_every), v_hub, hub_edit
                FROM decided
                WHERE NOT conflicts AND (log_seconds = 0 OR is_newest AND log_is_due)
    )
    SELECT array_agg(place), array_agg(number), array_agg(tenure),
            array_agg(CASE WHEN conflicts THEN 2 WHEN is_newest OR keeps_every THEN 0 ELSE 1 END::smallint)
        INTO decided_rows, decided_numbers, decided_tenures, decided_outcomes
        FROM decided;

    IF cardinality(p_embedded) > 0 THEN
        PERFORM p2p_sync.enqueue_embeddings(array_agg(o.path), array_agg(p_streams[o.stream_of]), array_agg(d.number),
                array_agg(o.keeps_every), array_agg(o.deleted), array_agg(o.map))
            FROM unnest(decided_rows, decided_numbers, decided_outcomes) AS d(place, number, outcome)
            JOIN unnest(p_paths, p_stream_of, p_keeps_every, p_deleted, p_maps) WITH ORDINALITY
                AS o(path, stream_of, keeps_every, deleted, map, place) USING (place)
            WHERE d.outcome = 0 AND place = ANY (p_embedded);
    END IF;

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
